"""A fine-tuned variant is one more model of the bundle; the others keep every bit, and so does a
stopped training."""

from __future__ import annotations

import shutil

import pytest
import torch

from ppcl_engine.algorithms.distillation.losses import velocity_loss
from ppcl_engine.algorithms.distillation.trainer import Diverged
from ppcl_engine.data.calibration import CLEAN, load_calibration
from ppcl_engine.models.assembly import open_variant
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.weights import Weights, parameter_count
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import ExportConfig
from ppcl_engine.settings.prune_settings import FinetuneConfig, VariantsConfig
from ppcl_engine.stages.convert.export import export
from ppcl_engine.stages.prune.finetune import finetune
from ppcl_engine.stages.prune.variants import variants
from ppcl_engine.stages.run_students import RunStudents
from ppcl_engine.system.interruption import Stopped
from ppcl_engine.system.seeds import draw_seed
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ...tiny.trained_run import (
    control_c,
    files_of,
    killed,
    poison,
    stop_after,
    velocities,
)

OTHERS = ("full", "small", "smallest", "1-2", "3-4", "1-2,3-4,ffn_image:1,text:3-4")
TINY = {"variant": "smallest", "steps": 6, "learning_rate": 2e-3, "warm_up": 2, "save_every": 4}


@pytest.fixture
def tuned(teacher_file):
    """Fine-tunes a variant of a run at tiny settings."""

    def work(run: Run, **settings) -> Run:
        finetune(
            FinetuneConfig(model=teacher_file, run=run.folder, device="cpu", **{**TINY, **settings})
        )
        return run

    return work


def losses(run: Run, name: str = "smallest_tuned") -> list[float]:
    return TensorFile(run.tuned_variant(name)).read("losses").tolist()


def results(run: Run) -> dict[str, bytes]:
    return files_of(run, "tuned/*.safetensors", "plan.json")


def test_it_gets_nearer_the_teacher_and_the_others_keep_every_bit(parts_run, tuned, teacher_file):
    run = parts_run(samples=16)
    rows, parts = (
        load_calibration(run.calibration).all_inputs(),
        files_of(run, "depth/*", "width/*"),
    )
    before = velocities(run, teacher_file, rows, *OTHERS)
    tuned(run, steps=80)
    after = velocities(run, teacher_file, rows, *OTHERS, "smallest_tuned")
    assert all(torch.equal(after[name], velocity) for name, velocity in before.items())
    assert files_of(run, "depth/*", "width/*") == parts
    old, new = (
        float(velocity_loss(after[name], after["full"])) for name in ("smallest", "smallest_tuned")
    )
    assert new < 0.8 * old
    variant = run.load_plan().variant("smallest_tuned")
    assert variant.tuned and variant.damage == pytest.approx(new, rel=1e-4)
    history = losses(run)
    assert sum(history[-16:]) < 0.85 * sum(history[:16])


def test_a_tuned_model_is_read_from_a_file_that_is_opened_once(
    parts_run, tuned, teacher_file, architecture, monkeypatch
):
    """Not for each of its tensors; but again when another file has come into its place."""
    run, weights = tuned(parts_run(), steps=1), Weights(teacher_file)
    path, opened, init = run.tuned_variant("smallest_tuned"), [], TensorFile.__init__
    monkeypatch.setattr(
        TensorFile, "__init__", lambda self, given: opened.append(given) or init(self, given)
    )
    plan = run.load_plan()
    students, variant = RunStudents(run, weights.config, architecture), plan.variant(path.stem)
    open_variant(weights, students, plan, variant, torch.float32, "cpu")
    assert opened.count(path) == 1
    shutil.copyfile(path, path.with_name("copy"))
    path.with_name("copy").replace(path)
    open_variant(weights, students, plan, variant, torch.float32, "cpu")
    assert opened.count(path) == 2


def test_all_parameters_are_trained_outer_layers_too(parts_run, tuned, teacher_file):
    run = parts_run()
    weights, plan = Weights(teacher_file), run.load_plan()
    students = RunStudents(run, weights.config, weights.architecture)
    model = open_variant(weights, students, plan, plan.variant("smallest"), torch.float32, "cpu")
    file = TensorFile(tuned(run).tuned_variant("smallest_tuned"))
    same = [n for n, p in model.named_parameters() if torch.equal(file.read(f"weight.{n}"), p)]
    # a text that nothing reads
    unread = {n for n in same if n.split(".")[1] in "35" and ("txt_m" in n or "add" in n)}
    assert set(same) == unread and len(same) < 20
    assert not torch.equal(file.read("weight.proj_out.weight"), model.proj_out.weight)
    found = run.load_plan().variant("smallest_tuned")
    assert (
        found.parameters == parameter_count(model)
        and found.bytes == 2 * found.parameters
        and found.flops > 0
    )


def test_a_bundle_holds_it_beside_the_others(
    parts_run, tuned, teacher_file, architecture, padded_inputs
):
    run, inputs = tuned(tuned(parts_run()), variant="small", name="mine"), padded_inputs(3)
    path = export(ExportConfig(model=teacher_file, run=run.folder, store="float32"))
    names = ("small", "smallest", "mine", "smallest_tuned", "3-4")
    ours = velocities(run, teacher_file, [inputs], *names)
    with torch.no_grad():
        for name in names:
            assert torch.equal(
                architecture.call(open_model(path, name, teacher_file), inputs), ours[name]
            )
    assert not torch.equal(ours["mine"], ours["small"])
    alone = export(
        ExportConfig(
            model=teacher_file,
            run=run.folder,
            store="float32",
            layout="ppcl",
            variant="mine",
            name="alone",
        )
    )
    assert torch.equal(architecture.call(open_model(alone), inputs), ours["mine"])


def test_the_sizes_stage_keeps_it(parts_run, tuned, teacher_file):
    run = tuned(parts_run())
    before = run.load_plan().variant("smallest_tuned")
    variants(VariantsConfig(model=teacher_file, run=run.folder, device="cpu"))
    assert run.load_plan().variant("smallest_tuned") == before and run.load_plan().variant("large")


@pytest.mark.parametrize("data", [0.0, 0.5])
def test_the_first_loss_in_closed_form(parts_run, tuned, teacher_file, architecture, model, data):
    """noise - clean is (x_t - clean) / t, of the noise and timesteps that seed and step give."""
    run, weights = parts_run(), Weights(teacher_file)
    plan, calibration = run.load_plan(), load_calibration(run.calibration)
    students = RunStudents(run, weights.config, architecture)
    inputs, clean = calibration.fresh(0, draw_seed(3, 0)), calibration.batches[0][CLEAN]
    with torch.no_grad():
        pruned = open_variant(
            weights, students, plan, plan.variant("smallest"), torch.float32, "cpu"
        )
        velocity, target = architecture.call(pruned, inputs), architecture.call(model, inputs)
    truth = (inputs["hidden_states"] - clean) / inputs["timestep"][:, None, None]
    expected = (velocity - target).square().sum() / target.square().sum()
    expected += data * (velocity - truth).square().sum() / truth.square().sum()
    assert losses(tuned(run, steps=1, seed=3, data=data))[0] == pytest.approx(
        float(expected), rel=1e-4
    )


def test_no_clean_pictures_no_loss_on_them(parts_run, tuned):
    run = parts_run(clean=False)
    with pytest.raises(
        ValueError, match="has no clean pictures; calibrate with --images, or use --data 0"
    ):
        tuned(run, data=0.5)
    assert not run.tuned.exists()
    tuned(run)


@pytest.mark.parametrize("step", [1, 3, 4, 5])
@pytest.mark.parametrize("ema", [0.999, 0.0])
def test_stopped_and_gone_on_is_the_same_bits(parts_run, tuned, monkeypatch, step, ema):
    whole, halted = tuned(parts_run("whole"), ema=ema), parts_run("halted")
    stop_after(monkeypatch, step, control_c)
    with pytest.raises(
        Stopped, match=f"stopped at step {step} of finetune smallest_tuned; saved. Run the same"
    ):
        tuned(halted, ema=ema)
    assert len(halted.load_plan().variants) == 2  # half a training is no variant
    assert results(tuned(halted, ema=ema)) == results(whole)


def test_killed_between_saves_is_the_same_bits(parts_run, tuned, monkeypatch):
    whole, halted = tuned(parts_run("whole")), parts_run("halted")
    stop_after(monkeypatch, 5, killed)
    with pytest.raises(SystemError):
        tuned(halted)
    assert TensorFile(halted.tuned_variant("smallest_tuned")).metadata["step"] == "4"
    assert results(tuned(halted)) == results(whole)


def test_checkpointing_streaming_and_saving_change_no_bit(parts_run, tuned):
    plain = tuned(parts_run("plain"))
    other = tuned(parts_run("other"), checkpointing=True, streamed=True, save_every=1)
    assert results(other) == results(plain)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_is_near_float32_and_keeps_float32_weights(parts_run, tuned, checkpointing):
    single, half = (
        tuned(parts_run("single")),
        tuned(parts_run("half"), dtype="bfloat16", checkpointing=checkpointing),
    )
    assert losses(half) == pytest.approx(losses(single), rel=0.1)
    file = TensorFile(half.tuned_variant("smallest_tuned"))
    assert {file.dtype(name) for name in file.keys()} == {torch.float32}


def test_a_second_run_changes_nothing_and_new_students_start_anew(parts_run, tuned):
    run = tuned(parts_run())
    before, first = results(run), losses(run)
    assert results(tuned(run)) == before
    with pytest.raises(
        ValueError, match=r"was trained with other settings \(learning_rate 0.002 -> 0.003\)"
    ):
        tuned(run, learning_rate=3e-3)
    tensors = {n: t * 1.01 for n, t in TensorFile(run.student("1-2")).read_all().items()}
    write_tensors(run.student("1-2"), tensors, {"settings": "{}", "step": "0"})
    assert losses(tuned(run))[0] != first[0] and len(losses(run)) == 6


def test_a_tuned_variant_can_be_tuned_again(parts_run, tuned, teacher_file, padded_inputs):
    run = tuned(tuned(parts_run()), variant="smallest_tuned", name="again")
    found = velocities(run, teacher_file, [padded_inputs(3)], "smallest_tuned", "again")
    assert not torch.equal(found["smallest_tuned"], found["again"])
    assert [v.name for v in run.load_plan().variants] == [
        "small",
        "smallest",
        "smallest_tuned",
        "again",
    ]


def test_names_that_are_taken_or_are_none(parts_run, tuned):
    run = parts_run()
    for name in ("small", "smallest", "full"):
        with pytest.raises(
            ValueError, match=f"--name '{name}' is the name of a variant that must stay as it is"
        ):
            tuned(run, name=name)
    for name in ("../up", "a b", "1-2,3-4"):
        with pytest.raises(ValueError, match="letters, digits, '-' and '_' only"):
            tuned(run, name=name)
    with pytest.raises(ValueError, match="variant 'tiny' is not in the plan"):
        tuned(run, variant="tiny")
    assert not run.tuned.exists()


def test_a_loss_that_is_not_a_number_keeps_the_last_save(parts_run, tuned, monkeypatch):
    run = parts_run()
    poison(monkeypatch, step=2)
    with pytest.raises(
        Diverged,
        match=r"loss is nan at step 2 of finetune smallest_tuned; the last good state \(step 2\) is kept",
    ):
        tuned(run, save_every=1)
    file = TensorFile(run.tuned_variant("smallest_tuned"))
    assert file.metadata["step"] == "2" and all(
        t.isfinite().all() for t in file.read_all().values()
    )
