"""Prune Model: a model, a size and a quality become one job, what it takes is said before it starts,
and its end is a file with pictures of every size."""

import folder_paths
import pytest
import torch

from benchmarks.shared.teachers import NARROW, random_teacher
from ppcl_engine.data.rendered.tables import fit_codec
from ppcl_engine.jobs.spec import configs, read_spec
from ppcl_engine.jobs.state import JobState, write_state
from ppcl_engine.run import Run
from ppcl_engine.stages import run_stage

TINY = {
    "calibrate": {"samples": 8, "steps": 2},
    "detect": {"samples": 4, "longest": 3, "bootstrap": 2},
    "distill-depth": {"rounds": 1, "updates": 2},
    "detect-width": {"samples": 2, "longest": 2},
    "distill-width": {"rounds": 1, "updates": 2},
    "polish": {"steps": 2},
    "variants": {"samples": 2},
    "evaluate": {"captions": 2, "steps": 2},
}
CAPTIONS = "a red K on a blue circle, green background\na white 7 on a black square, red background"
NODE = {
    "prompts": CAPTIONS,
    "target": 0.6,
    "target_in": "share of the model",
    "quality": "quick",
    "name": "mine",
    "size": 0,
    "most_hours": 24.0,
    "device": "cpu",
    "seed": 0,
    "wait": True,
    "start": False,
    "keep_running": False,
    "preview_seconds": 0,
}


@pytest.fixture(scope="module")
def small_teacher(models):
    """Name of a random model that brings its tables."""
    path = models.diffusion_models / "tables.safetensors"
    random_teacher(path, {**NARROW, "num_layers": 6}, seed=0, codec=fit_codec(0, samples=16))
    yield path.name
    path.unlink()


@pytest.fixture
def output(pack, tmp_path, monkeypatch):
    """Runs in a folder of their own, with presets that take seconds."""
    presets = pack("make.budgets").budgets_by_quality.__globals__["PRESETS"]
    for stage, settings in TINY.items():
        monkeypatch.setitem(presets[stage], "quick", settings)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return pack("paths").runs()


def test_from_a_wish_to_a_file(run_node, output, small_teacher):
    """The job is done here, as its worker would do it."""
    given = {"model_file": small_teacher, **NODE}
    name, card, other_card, text, file = run_node("PPCL_PruneModel", **given)
    assert torch.equal(card, other_card) and file == ""
    assert text.startswith(f"{name}: not started; about ")
    assert [line.partition(":")[0] for line in text.splitlines()[1:]] == [
        "as set",
        "quick",
        "good",
        "paper",
    ]
    folder = output.path(name)
    stages = configs(read_spec(folder), folder)
    assert (folder / "recipe.toml").read_text().startswith(f'[common]\nrun = "{folder}"')
    for stage, config in stages:
        run_stage(stage, config)
    write_state(folder, JobState(status="done"))
    again, pictures, layer_map, text, file = run_node("PPCL_PruneModel", **given)
    assert again == name and file == f"runs/{name}/mine.ppcl.safetensors"
    assert pictures.shape[2] > 3 * 300 and layer_map.shape[2] > 300  # four sizes side by side
    assert text.startswith(file) and "smallest" in text
    plan = Run(folder).load_plan()
    assert plan.variant("smallest").parameters <= 0.6 * plan.variant("full").parameters


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": 0.1}, "target is 10% of the full model's .* GB; choose 30% to 95% of it"),
        ({"target": 5.0, "target_in": "GB"}, "target is .*% of the full model's"),
        ({"prompts": " "}, "0 prompts are given"),
        ({"name": "../up"}, "name '../up'"),
        ({"device": "cuda:77"}, "device cuda:77 is not on this machine; "),
        ({"quality": "best"}, "quality 'best' is not a choice; choose from quick, good, paper"),
        ({"start": True, "most_hours": 0.0}, "most_hours is 0; choose a quicker quality"),
    ],
)
def test_what_cannot_be_is_said_before_it_starts(run_node, output, small_teacher, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        run_node("PPCL_PruneModel", **{"model_file": small_teacher, **NODE, **changes})
    assert "\n" not in str(error.value)


def test_a_model_without_a_text_encoder_needs_one(run_node, output, teacher):
    with pytest.raises(ValueError, match="brings no text encoder; connect one to clip$"):
        run_node("PPCL_PruneModel", **{"model_file": teacher.name, **NODE})
