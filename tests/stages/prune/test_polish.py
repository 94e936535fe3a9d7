"""Polished parts serve every variant better, nobody loses the unpolished ones, and stopping changes
no bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ppcl_engine.algorithms.distillation.trainer import Diverged
from ppcl_engine.data.calibration import load_calibration
from ppcl_engine.models.opening import open_model
from ppcl_engine.plan import Variant
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import ExportConfig
from ppcl_engine.settings.prune_settings import PolishConfig, VariantsConfig
from ppcl_engine.stages.convert.export import export
from ppcl_engine.stages.prune.polish import polish
from ppcl_engine.stages.prune.variants import variants
from ppcl_engine.system.interruption import Stopped
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ...tiny.trained_run import (
    PROJECTIONS,
    SMALL,
    control_c,
    files_of,
    killed,
    poison,
    stop_after,
    velocities,
)

NAMES = (
    "1-2",
    "3-4",
    "1-2,3-4",
    "ffn_text:0",
    "1-2,3-4,text:3-4",
    "1-2,3-4,ffn_text:0,ffn_image:1,ffn_image:3,text:3-4",
)
TINY = {"steps": 6, "learning_rate": 2e-3, "warm_up": 2, "save_every": 4, "all_on": 0.25}


@pytest.fixture
def polished(teacher_file):
    """Polishes a run at tiny settings."""

    def work(run: Run, **settings) -> Run:
        polish(
            PolishConfig(model=teacher_file, run=run.folder, device="cpu", **{**TINY, **settings})
        )
        return run

    return work


def losses(run: Run) -> list[float]:
    return TensorFile(run.polish_state).read("losses").tolist()


def results(run: Run) -> dict[str, bytes]:
    return files_of(run, "polished/**/*.safetensors", "plan.json")


def test_every_variant_gets_nearer_the_teacher(parts_run, polished, teacher_file):
    run = parts_run(samples=16)
    rows = load_calibration(run.calibration).all_inputs()
    before = velocities(run, teacher_file, rows, "full", *NAMES)
    polished(run, steps=60)
    after = velocities(run, teacher_file, rows, "full", *NAMES)
    assert torch.equal(before["full"], after["full"])
    for name in NAMES:
        old, new = (
            (v[name] - v["full"]).square().sum() / v["full"].square().sum() for v in (before, after)
        )
        assert new < 0.97 * old, name
    history = losses(run)
    assert sum(history[-12:]) < 0.8 * sum(history[:12])


def test_the_parts_it_came_from_stay_and_come_back_without_it(parts_run, polished, teacher_file):
    run, rows = parts_run(), None
    rows = load_calibration(run.calibration).all_inputs()
    parts, before = files_of(run, "depth/*", "width/*"), velocities(run, teacher_file, rows, *NAMES)
    polished(run)
    assert files_of(run, "depth/*", "width/*") == parts
    assert len(files_of(run, "polished/depth/*")) == 2 and len(
        files_of(run, "polished/width/*")
    ) == len(PROJECTIONS)
    assert not any(
        torch.equal(v, before[name])
        for name, v in velocities(run, teacher_file, rows, *NAMES).items()
    )
    for path in run.polished_parts.rglob("*.safetensors"):
        path.unlink()
    assert all(
        torch.equal(v, before[name])
        for name, v in velocities(run, teacher_file, rows, *NAMES).items()
    )


def test_a_polished_part_of_an_earlier_training_does_not_count(parts_run, polished):
    run = polished(parts_run())
    student, other = run.student("1-2"), run.student("3-4")
    assert run.best(student) == run.polished(student) and run.best(other) == run.polished(other)
    first = losses(run)
    tensors = {n: t + 0.01 for n, t in TensorFile(student).read_all().items()}
    write_tensors(student, tensors, {"settings": "{}", "step": "0"})
    assert run.best(student) == student and run.best(other) == run.polished(other)
    polished(run)  # starts from the new student, not from its saved state
    assert (
        run.best(student) == run.polished(student)
        and losses(run)[0] != first[0]
        and len(losses(run)) == 6
    )


@pytest.mark.parametrize("step", [1, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stopped_and_gone_on_is_the_same_bits(parts_run, polished, monkeypatch, step, dtype):
    whole, halted = polished(parts_run("whole"), dtype=dtype), parts_run("halted")
    stop_after(monkeypatch, step, control_c)
    with pytest.raises(
        Stopped, match=f"stopped at step {step} of polish; saved. Run the same command to go on"
    ):
        polished(halted, dtype=dtype)
    assert TensorFile(halted.polish_state).metadata["step"] == str(step)
    assert not files_of(halted, "polished/depth/*") and len(halted.load_plan().variants) == 2
    assert results(polished(halted, dtype=dtype)) == results(whole)


def test_killed_between_saves_is_the_same_bits(parts_run, polished, monkeypatch):
    whole, halted = polished(parts_run("whole")), parts_run("halted")
    stop_after(monkeypatch, 5, killed)
    with pytest.raises(SystemError):
        polished(halted)
    assert TensorFile(halted.polish_state).metadata["step"] == "4"
    assert results(polished(halted)) == results(whole)


def test_checkpointing_streaming_and_saving_change_no_bit(parts_run, polished):
    plain = polished(parts_run("plain"))
    other = polished(parts_run("other"), checkpointing=True, streamed=True, save_every=1)
    assert results(other) == results(plain)


def test_bfloat16_is_near_float32_and_keeps_float32_weights(parts_run, polished):
    single, half = polished(parts_run("single")), polished(parts_run("half"), dtype="bfloat16")
    assert losses(half) == pytest.approx(losses(single), rel=0.1)
    file = TensorFile(half.polish_state)
    assert {file.dtype(name) for name in file.keys()} == {torch.float32}


def test_a_second_run_changes_nothing_and_the_sizes_stay(parts_run, polished, teacher_file):
    run = parts_run()
    tuned = Variant(name="mine", intervals=SMALL, tuned=True)
    plan = run.load_plan()
    run.plan.write_text(plan.with_parts(variants=(*plan.variants, tuned)).to_json())
    polished(run)
    # sizes measured on other parts are gone
    assert run.load_plan() == replace(plan, variants=(tuned,))
    variants(VariantsConfig(model=teacher_file, run=run.folder, device="cpu"))
    before = results(run)
    assert results(polished(run)) == before and b"large" in before["plan.json"]


def test_a_subset_of_the_parts(parts_run, polished):
    run = polished(parts_run(), variant="3-4,ffn_image:3")
    trained = {path.name for path in run.polished_parts.rglob("*.safetensors")}
    assert trained == {
        "state.safetensors",
        "3-4.safetensors",
        "3-4.ffn_image.safetensors",
        "3.ffn_image.safetensors",
    }
    with pytest.raises(ValueError, match=r"was trained with other settings \(parts"):
        polished(run, variant="3-4")


def test_depth_alone_and_a_bundle_of_what_is_polished(
    parts_run, polished, teacher_file, architecture, padded_inputs
):
    run = polished(parts_run(width=False))
    path = export(ExportConfig(model=teacher_file, run=run.folder, store="float32"))
    ours = velocities(run, teacher_file, [padded_inputs(3)], "1-2,3-4")["1-2,3-4"]
    assert torch.equal(
        architecture.call(open_model(path, "1-2,3-4", teacher_file), padded_inputs(3)), ours
    )


def test_a_loss_that_is_not_a_number_keeps_the_last_save(parts_run, polished, monkeypatch):
    run = parts_run()
    poison(monkeypatch, step=2)
    with pytest.raises(
        Diverged, match=r"loss is nan at step 2 of polish; the last good state \(step 2\) is kept"
    ):
        polished(run, save_every=1)
    file = TensorFile(run.polish_state)
    assert file.metadata["step"] == "2" and all(
        t.isfinite().all() for t in file.read_all().values()
    )


def test_what_cannot_be_polished(parts_run, polished):
    run = parts_run()
    with pytest.raises(ValueError, match="variant 'full' replaces nothing"):
        polished(run, variant="full")
    with pytest.raises(ValueError, match="width site 'text:5-5' is not in the plan"):
        polished(run, variant="3-4,text:5-5")
    run.projection("3-4", "text").unlink()
    with pytest.raises(ValueError, match="run distill-width first"):
        polished(run)
