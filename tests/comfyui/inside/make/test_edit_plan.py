"""Plans by hand: what is kept, what is refused, what is said of their damage; as runs of a
store."""

import sys

import pytest
import torch

from ppcl_engine.jobs.state import JobState, write_state
from ppcl_engine.plan import Interval, PruningPlan, WidthSite
from ppcl_engine.run import Run
from ppcl_engine.system.atomic import write_json, write_text
from ppcl_engine.system.tensor_files import write_tensors

PLAN = PruningPlan(
    architecture="qwen_image",
    config={"num_layers": 8},
    num_blocks=8,
    fingerprint="f",
    intervals=(
        Interval(first=1, last=2, stability=0.5, correction="affine"),
        Interval(first=5, last=6),
    ),
    sites=(WidthSite(block=0, kind="ffn_image", score=0.25),),
)


@pytest.fixture
def plan(pack):
    """A plan made of the pack's own copy of the classes."""
    return sys.modules[
        pack("make.edit_plan").PruningPlan.__module__.rpartition(".")[0]
    ].plan_from_json(PLAN.to_json())


@pytest.fixture
def edited(pack, plan):
    def edit(intervals="", sites="", form="paper", scores=None):
        return pack("make.edit_plan").edited(plan, intervals, sites, form, scores or {})

    return edit


def test_empty_text_keeps_the_plan(edited, plan):
    assert edited() == plan and edited(" ", "\n") == plan


def test_intervals_that_stay_keep_what_is_known(edited, plan):
    new = edited("3-4,1-2")
    assert [i.name for i in new.intervals] == ["1-2", "3-4"]
    assert new.intervals[0] == plan.intervals[0] and new.intervals[1].stability is None
    assert new.sites == plan.sites


def test_none_removes_all(edited):
    assert edited("none").intervals == () and edited(sites="none").sites == ()


def test_sites_get_the_damage_that_was_measured(edited):
    plan = edited(
        sites="ffn_image:0 ffn_text:3 text:5-6",
        form="paper",
        scores={"ffn_text:3": 0.5, "text:5-6": 0.125},
    )
    assert [(s.name, s.score) for s in plan.sites] == [
        ("ffn_image:0", 0.25),
        ("ffn_text:3", 0.5),
        ("text:5", 0.125),
        ("text:6", 0.125),
    ]
    assert edited(sites="ffn_image:3", form="gated").sites[0].form == "gated"


@pytest.mark.parametrize(
    "intervals, sites, message",
    [
        ("1-2 2-3", "", "intervals 1-2 and 2-3 overlap"),
        ("7-9", "", "interval 7-9 is not inside blocks 0-7"),
        ("4-4", "", "at least two blocks"),
        ("all", "", "'all' is not an interval; write them as '3-4 8-10'"),
        ("", "ffn:1", "'ffn:1' is not a width site"),
        ("", "text:0-1", "text group text:0-1 has no full block before it"),
        ("", "text:2-3", "text group text:2-3 cuts interval 1-2"),
        ("", "ffn_image:6", "block 6 is inside interval 5-6"),
        ("", "ffn_image:99", "there are blocks 0-7 only"),
        ("1-99", "", "is not inside blocks 0-7"),
        ("", "ffn_image:99999999999999999999", "is not a width site; write them as"),
        ("1-99999999999999999999", "", "is not an interval; write them as"),
    ],
)
def test_what_cannot_be_is_one_line(edited, intervals, sites, message):
    with pytest.raises(ValueError, match=message) as caught:
        edited(intervals, sites)
    assert "\n" not in str(caught.value)


def test_damage_is_said_where_it_was_measured(pack, edited, plan):
    """[1, 2] and [5, 6] were; a longer one than the search went to was not."""
    damage = torch.full((8, 3), torch.nan, dtype=torch.float64)
    damage[1, 1], damage[5, 1] = 0.0125, 0.5
    text = pack("make.results").plan_text(plan, damage)
    assert text.splitlines()[:3] == [
        "2 intervals, 2 of 8 blocks removed",
        "1-2: damage 0.013, found in 50 % of resamples",
        "5-6: damage 0.5",
    ]
    assert (
        "damage of all of them together about 0.512 (they nearly add up)" in text
        and "ffn_image:0 0.25" in text
    )
    longer = pack("make.results").plan_text(edited("1-4"), damage)
    assert "1-4: damage not measured" in longer and "together" not in longer


@pytest.fixture
def store(pack, teacher, tmp_path, monkeypatch):
    """A run with a plan of the tiny teacher, in an output folder of its own."""
    import folder_paths

    from ....tiny.trained_run import write_parts

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    runs = pack("paths").runs()
    folder = runs.root / "detect-00000000"
    folder.mkdir(parents=True)
    plan = write_parts(Run(folder), teacher)
    error = torch.arange(36, dtype=torch.float64).reshape(6, 3, 2)
    tensors = {"error": error, "power": torch.full((2,), 100.0, dtype=torch.float64)}
    write_tensors(
        Run(folder).curves,
        {**tensors, "cka": torch.rand(6, 3, 2, dtype=torch.float64)},
        {"settings": "{}"},
    )
    write_json(
        folder / "run.json",
        {"version": 1, "stages": [["detect", {"model": str(teacher)}]], "identity": "x"},
    )
    write_state(folder, JobState(status="done"))
    write_text(Run(folder).plan, plan.with_parts(sites=(), variants=()).to_json())
    return runs


def test_the_node_makes_a_run(store, run_node):
    name, picture, text = run_node(
        "PPCL_EditPlan", run="detect-00000000", intervals="1-2", sites="", form="paper"
    )
    assert picture.shape[-1] == 3 and text.startswith(
        "1 interval, 1 of 6 blocks removed\n1-2: damage 0.085"
    )
    folder = store.path(name)
    assert [i.name for i in Run(folder).load_plan().intervals] == ["1-2"]
    assert Run(folder).student("1-2").exists()
    assert [i.name for i in Run(store.path("detect-00000000")).load_plan().intervals] == [
        "1-2",
        "3-4",
    ]
    again, _, _ = run_node(
        "PPCL_EditPlan", run="detect-00000000", intervals="1-2", sites="", form="paper"
    )
    assert again == name


def test_its_model_is_found_behind_it(store, run_node, pack, teacher):
    name, _, _ = run_node(
        "PPCL_EditPlan", run="detect-00000000", intervals="3-4", sites="", form="paper"
    )
    assert pack("make.runs").model_of(name) == teacher


@pytest.mark.parametrize(
    "run", ["../../x", "/etc", "detect-0000000O", "a" * 5000, "", "detect-00000000/..", 7, None]
)
def test_forged_runs(store, run_node, run):
    with pytest.raises(ValueError, match="is not the name of a run|is not in|connect it"):
        run_node("PPCL_EditPlan", run=run, intervals="", sites="", form="paper")


def test_a_model_outside_the_hosts_folders(store, pack, tmp_path):
    """A run's folder may come from anywhere."""
    folder = store.root / "detect-00000000"
    write_json(
        folder / "run.json",
        {"version": 1, "stages": [["detect", {"model": "/etc/passwd"}]], "identity": "x"},
    )
    with pytest.raises(ValueError, match="passwd, the model of run detect-00000000, is neither in"):
        pack("make.runs").model_of("detect-00000000")


def test_a_link_out_of_the_runs_is_no_export(store, pack, tmp_path):
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(b"x")
    folder = store.root / "export-00000000"
    (folder / "exports").mkdir(parents=True)
    (folder / "exports" / "a.safetensors").symlink_to(secret)
    (folder / "exports" / "b.safetensors").write_bytes(b"x")
    write_json(
        folder / "run.json", {"version": 1, "stages": [["export", {"model": "m"}]], "identity": "x"}
    )
    write_state(folder, JobState(status="done"))
    assert list(pack("paths").exported_files()) == ["runs/export-00000000/b.safetensors"]
    with pytest.raises(ValueError, match="is neither in"):
        pack("paths").model_path("runs/export-00000000/a.safetensors")
