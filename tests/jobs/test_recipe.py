"""The whole method as a job: how much goes by depth, what fits the machine, and the same as a run file."""

from pathlib import Path

import pytest

from ppcl_engine.__main__ import read_run_file
from ppcl_engine.demo.bundled import bundled
from ppcl_engine.estimate.budget import COLUMNS, Budget, budgets_by_quality
from ppcl_engine.jobs import recipe as recipes
from ppcl_engine.jobs.recipe import Wish, brings_text_encoder, recipe, recipe_text, share_of
from ppcl_engine.jobs.spec import JobSpec, configs
from ppcl_engine.jobs.state import JobState
from ppcl_engine.jobs.whole_job import share_done, stage_seconds

TEACHER = bundled("qwen")
PROMPTS = {"prompts": "prompts-1.txt"}


def wish(model: object = TEACHER, **changes) -> Wish:
    return Wish(
        **{"model": model, "share": 0.6, "quality": "quick", "source": PROMPTS, "device": "cpu"}
        | changes
    )


@pytest.mark.parametrize(
    ("model", "share", "removed"),
    [("qwen_image", 0.519, 25), ("flux1_dev", 0.672, 10), ("sd35_large", 0.62, 13)],
)
def test_depth_takes_what_the_shipped_recipes_give_it(model, share, removed, tmp_path):
    """As many blocks as configs/ has for these sizes; one more of SD3.5."""
    settings = dict(recipe(wish(Path(model), share=share), tmp_path))
    assert settings["detect"]["remove"] == removed and settings["detect-width"]["share"] == share
    assert settings["calibrate"]["batch"] == 1 and settings["calibrate"]["height"] == 1024
    assert "learning_rate" not in settings["distill-depth"] and settings["polish"]["checkpointing"]


def test_a_target_in_gigabytes_is_a_share():
    assert share_of(Path("qwen_image"), 21.2) == pytest.approx(0.519, abs=1e-3)
    with pytest.raises(ValueError, match=r"^target is 10% of the full model's 40.9 GB; choose 30%"):
        share_of(Path("qwen_image"), 4.0)
    with pytest.raises(ValueError, match="which is 12.3 to 38.8 GB$"):
        recipe(wish(Path("qwen_image"), share=1.0), Path("runs"))


def test_the_recipe_fits_the_machine(tmp_path, monkeypatch):
    def chosen(memory: float) -> tuple[str, bool]:
        monkeypatch.setattr(recipes, "device_memory", lambda device: memory)
        row = recipe(wish(Path("flux1_dev")), tmp_path)[0][1]
        return row["dtype"], row["streamed"]

    assert chosen(500e9) == ("float32", False)
    assert chosen(70e9) == ("float32", True)
    assert chosen(1e9) == ("bfloat16", True)


def test_the_recipe_is_a_run_file_too(tmp_path):
    """`ppcl run recipe.toml` does what the job does."""
    stages = recipe(wish(name="mine"), tmp_path)
    (tmp_path / "recipe.toml").write_text(recipe_text(stages, tmp_path))
    assert read_run_file(tmp_path / "recipe.toml") == configs(
        JobSpec(stages=tuple(stages)), tmp_path
    )


def test_without_words_nothing_is_compared(tmp_path):
    stages = dict(recipe(wish(source={"embeddings": "e.safetensors"}), tmp_path))
    assert "evaluate" not in stages and stages["calibrate"]["embeddings"] == "e.safetensors"
    assert brings_text_encoder(TEACHER) and not brings_text_encoder(tmp_path)


def test_what_a_job_takes_is_added_up(tmp_path, monkeypatch):
    stages = configs(JobSpec(stages=tuple(recipe(wish(), tmp_path))), tmp_path)
    kinds, names = [config for _, config in stages], [name for name, _ in stages]
    budget = Budget(kinds)
    assert [row[0] for row in budget.table] == [COLUMNS[0], *names, "all of it"]
    assert budget.memory == max(row.memory for row in budget.needs) and budget.refusal == ""
    assert budget.line.startswith("about ") and " on cpu, " in budget.line
    others = budgets_by_quality(kinds, names)
    assert others["quick"].seconds == budget.seconds < others["good"].seconds
    assert others["good"].seconds < others["paper"].seconds
    assert budgets_by_quality(kinds[-2:-1], names[-2:-1]) == {}  # export has no preset
    monkeypatch.setattr("ppcl_engine.estimate.budget.free_disk", lambda folder: 1000)
    assert Budget(kinds).refusal.endswith("0.0 MB are free: free space")


def test_the_bar_is_over_the_whole_job():
    """By time, from where the last attempt began; a stage of nothing counts its two seconds."""
    events = [{"kind": "started"}, {"kind": "estimated", "seconds": 50.0}, {"kind": "finished"}]
    events += [{"kind": "started"}, *({"kind": "estimated", "seconds": s} for s in (0.0, 8.0))]
    seconds = stage_seconds(events)
    assert seconds == {2: 2.0, 3: 8.0} and stage_seconds([]) == {}
    half = JobState(status="running", number=3, step=5, steps=10)
    assert share_done(half, seconds) == pytest.approx(0.6)
    assert share_done(JobState(status="running", number=2), seconds) == 0.0
    assert share_done(half, {}) == 0.0
