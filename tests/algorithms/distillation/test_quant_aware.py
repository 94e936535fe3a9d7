"""`--quant-aware`: what training reads is rounded, what it moves and leaves is not."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from functools import partial
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

from ppcl_engine.__main__ import USER_ERROR, main
from ppcl_engine.algorithms.distillation import trainer as training
from ppcl_engine.algorithms.distillation.losses import interval_loss
from ppcl_engine.algorithms.distillation.quantization import (
    BITS,
    NONE,
    quantised_in_training,
    simulated,
)
from ppcl_engine.algorithms.distillation.trainable import TrainableParts
from ppcl_engine.algorithms.distillation.trainer import Trainer, rounding, saved_weights
from ppcl_engine.algorithms.distillation.tuning import AveragedTrainer
from ppcl_engine.data.calibration import load_calibration
from ppcl_engine.estimate.needs import needs
from ppcl_engine.models.assembly import open_variant
from ppcl_engine.models.layout import layout_of
from ppcl_engine.models.streaming import Teacher, embed_with
from ppcl_engine.models.weights import Weights
from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import (
    DistillDepthConfig,
    DistillWidthConfig,
    FinetuneConfig,
    PolishConfig,
)
from ppcl_engine.stages.prune.distill_depth import distill_depth
from ppcl_engine.stages.prune.distill_width import distill_width
from ppcl_engine.stages.prune.finetune import finetune, variant_chain
from ppcl_engine.stages.prune.polish import polish, subset_chain
from ppcl_engine.stages.run_students import RunStudents
from ppcl_engine.system.tensor_files import TensorFile

from ...tiny.processes import exit_code
from ...tiny.trained_run import files_of, write_parts

STAGES = {
    "distill-depth": (
        DistillDepthConfig,
        distill_depth,
        {"rounds": 2, "updates": 4, "correction": "affine"},
        "depth",
    ),
    "distill-width": (DistillWidthConfig, distill_width, {"rounds": 2, "updates": 2}, "width"),
    "polish": (PolishConfig, polish, {"steps": 4, "save_every": 2}, "polished"),
    "finetune": (FinetuneConfig, finetune, {"steps": 4, "save_every": 2, "name": "tuned"}, "tuned"),
}


@pytest.fixture(autouse=True)
def from_half_on(monkeypatch):
    """The last tenth of so few steps is none."""
    monkeypatch.setattr(training, "PLAIN_SHARE", 0.5)


@pytest.fixture
def new_run(tmp_path, teacher_file, make_run):
    def make(name: str = "run") -> Run:
        run = Run(make_run(tmp_path / name, teacher_file))
        write_parts(run, teacher_file)
        return run

    return make


@pytest.fixture
def train(teacher_file):
    """One stage with tiny settings; students of distill-depth from nothing. Returns what it
    leaves."""

    def start(stage: str, run: Run, **settings) -> dict[str, bytes]:
        kind, function, tiny, folder = STAGES[stage]
        common = {
            "model": teacher_file,
            "run": run.folder,
            "device": "cpu",
            "warm_up": 1,
            "learning_rate": 1e-3,
        }
        function(kind(**{**common, **tiny, **settings}))
        return files_of(run, f"{folder}/**/*.safetensors")

    return start


def without(run: Run, stage: str) -> Run:
    """What the stage would leave in the run is not there yet."""
    shutil.rmtree(run.folder / STAGES[stage][-1], ignore_errors=True)
    return run


def round_in_place(module: nn.Module, kind: str) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.weight.data = simulated(part.weight, kind)
    return module


@pytest.mark.parametrize("kind", BITS)
def test_the_gradient_is_that_of_the_rounded_weight_in_closed_form(kind):
    """The gradient of |Q(W) x + b - y|^2 / 2 at W is (Q(W) x + b - y) x^T."""
    torch.manual_seed(0)
    linear, x, y = nn.Linear(128, 5), torch.randn(7, 128), torch.randn(7, 5)
    weight, names = linear.weight, [name for name, _ in linear.named_parameters()]
    rest = x @ simulated(weight.detach(), kind).T + linear.bias.detach() - y
    with quantised_in_training(linear, kind):
        assert torch.equal(linear.weight, simulated(weight.detach(), kind)) and not torch.equal(
            linear.weight, weight
        )
        assert [name for name, _ in linear.named_parameters()] == names and next(
            linear.parameters()
        ) is weight
        loss = (linear(x) - y).square().sum() / 2
    loss.backward()
    assert linear.weight is weight
    torch.testing.assert_close(weight.grad, rest.T @ x)
    torch.testing.assert_close(linear.bias.grad, rest.sum(0))


def test_only_what_is_trained_and_only_meanwhile():
    block = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).requires_grad_(False))
    before = [linear.weight for linear in block]
    with pytest.raises(KeyError), quantised_in_training(block, "int4"):
        assert not torch.equal(block[0].weight, before[0]) and block[1].weight is before[1]
        raise KeyError
    with quantised_in_training(block, NONE):
        assert [linear.weight for linear in block] == before
    view = before[0][:4]  # as a block that is put together for one step has it
    cut = nn.Linear(8, 4)
    del cut.weight
    cut.weight = view
    with quantised_in_training(cut, "int8"):
        cut(torch.ones(8)).sum().backward()
    assert cut.weight is view and before[0].grad.tolist() == [[1.0] * 8] * 4 + [[0.0] * 8] * 4


def test_a_student_runs_on_rounded_weights_in_the_end_and_keeps_its_own(
    new_run, train, architecture, model
):
    """At rate 0 the copy of the first block stays; its loss is its own, then that of the rounded
    copy."""
    run = without(new_run(), "distill-depth")
    train(
        "distill-depth",
        run,
        correction="none",
        quant_aware="int4",
        rounds=1,
        updates=2,
        learning_rate=0.0,
    )
    state = architecture.embed(model, load_calibration(run.calibration).fresh(0, 0))
    states = [state]
    for block in model.transformer_blocks:
        states.append(architecture.run_block(block, states[-1]))
    block = model.transformer_blocks[1]
    expected = [
        float(
            interval_loss(
                "mse", architecture.run_block(student, states[1]), states[3], ("image", "text")
            )
        )
        for student in (block, round_in_place(copy.deepcopy(block), "int4"))
    ]
    assert TensorFile(run.student("1-2")).read("losses").tolist() == pytest.approx(
        expected, rel=1e-5
    )
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)
    saved = saved_weights(run.student("1-2"))
    assert all(torch.equal(saved[name], tensor) for name, tensor in block.state_dict().items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_parts_together_run_as_if_they_were_stored_rounded(
    new_run, teacher_file, padded_inputs, checkpointing
):
    """Students and projections of every kind, blocks that are put together for one step, the
    teacher's own as they are."""
    run, inputs = new_run(), padded_inputs(3)
    plan, teacher = (
        run.load_plan(),
        Teacher(Weights(teacher_file), torch.float32, "cpu", streamed=False),
    )
    students = RunStudents(run, teacher.config, teacher.architecture)
    parts, rounded = (
        TrainableParts(plan, plan.everything(), teacher.architecture, students, "cpu")
        for _ in range(2)
    )

    def loss_of(parts: TrainableParts, *bits: str) -> torch.Tensor:
        chain = subset_chain(teacher, parts, layout_of(plan, plan.everything()), inputs, *bits)
        return chain.loss(checkpointing)

    loss = loss_of(parts.requires_grad_(True), "int4")
    assert torch.equal(loss, loss_of(round_in_place(rounded, "int4")))
    assert not torch.equal(loss, loss_of(parts))
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in parts.parameters())
    assert {id(p) for p in parts.parameters() if p.grad is not None} >= {
        id(part.weight)
        for student in parts.students.values()
        for part in (student.attn.to_q, student.attn.to_v)
    }


def test_a_whole_model_runs_rounded_and_checkpointing_changes_no_bit(
    new_run, teacher_file, padded_inputs
):
    run = new_run()
    plan, teacher = (
        run.load_plan(),
        Teacher(Weights(teacher_file), torch.float32, "cpu", streamed=False),
    )
    variant, students = (
        plan.variant("smallest"),
        RunStudents(run, teacher.config, teacher.architecture),
    )
    model, rounded = (
        open_variant(teacher.weights, students, plan, variant, torch.float32, "cpu")
        for _ in range(2)
    )
    round_in_place(rounded.transformer_blocks, "int8")
    found, layout = [], layout_of(plan, variant)
    for checkpointing in (False, True):
        model.requires_grad_(True).zero_grad()
        begin = partial(embed_with, teacher, model, padded_inputs(3))
        chain = variant_chain(teacher, model, layout, begin, torch.sum, "int8")
        velocity = chain.velocity(checkpointing)
        velocity.square().sum().backward()
        found.append(
            (velocity, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        )
    (plain, gradients), (again, others) = found
    assert torch.equal(plain, again) and all(
        torch.equal(others[name], g) for name, g in gradients.items()
    )
    with torch.no_grad():
        torch.testing.assert_close(plain, teacher.architecture.call(rounded, padded_inputs(3)))


@pytest.mark.parametrize(
    "stage, updates",
    [
        ("distill-depth", 3),
        ("distill-depth", 14),
        ("distill-width", 20),
        ("polish", 3),
        ("finetune", 3),
    ],
)
def test_killed_and_gone_on_is_the_same_bits(new_run, train, stage, updates):
    settings = {"quant_aware": "int4", "streamed": True}
    whole, halted = (without(new_run(name), stage) for name in ("whole", "halted"))
    expected = train(stage, whole, **settings)
    child = os.fork()
    if child == 0:
        kill_at(updates)
        train(stage, halted, **settings)
        os._exit(0)
    assert exit_code(child) == -signal.SIGKILL
    assert train(stage, halted, **settings) == expected != {}


def kill_at(updates: int) -> None:
    """kill -9 of this process in its n-th update."""
    done = []

    def counted(update, trainer: Trainer | AveragedTrainer, *arguments) -> None:
        done.append(trainer.step)
        if len(done) == updates:
            os.kill(os.getpid(), signal.SIGKILL)
        update(trainer, *arguments)

    for kind in (Trainer, AveragedTrainer):
        kind.update = lambda *arguments, update=kind.update: counted(update, *arguments)


@pytest.mark.parametrize("stage", STAGES)
def test_it_is_in_the_metadata_where_it_is_on_and_files_have_the_same_form(new_run, train, stage):
    """So files of before it was there go on, and none goes on the other way."""
    runs = {kind: without(new_run(kind), stage) for kind in (NONE, "int8")}
    files = {}
    for kind, run in runs.items():
        paths = [run.folder / name for name in train(stage, run, quant_aware=kind)]
        files[kind] = {
            path.name: TensorFile(path) for path in paths if "settings" in TensorFile(path).metadata
        }
    assert files[NONE].keys() == files["int8"].keys() != set()
    for name, plain in files[NONE].items():
        aware = files["int8"][name]
        settings, theirs = (json.loads(file.metadata["settings"]) for file in (aware, plain))
        assert settings.pop("quant_aware") == "int8" and settings.keys() == theirs.keys()
        assert aware.entries.keys() == plain.entries.keys()
        assert any(not torch.equal(aware.read(key), plain.read(key)) for key in plain.keys())
    for kind, other, words in ((NONE, "int4", "None -> 'int4'"), ("int8", NONE, "'int8' -> None")):
        with pytest.raises(
            ValueError, match=rf"trained with other settings \(quant_aware {words}\)"
        ):
            train(stage, runs[kind], quant_aware=other)


def test_kinds_are_those_that_are_simulated(new_run, train, tmp_path, capsys):
    assert get_args(get_type_hints(DistillDepthConfig)["quant_aware"]) == (NONE, *BITS)
    path = tmp_path / "run.toml"
    path.write_text('[common]\nmodel = "m"\nrun = "r"\n[distill-depth]\nquant_aware = "int2"\n')
    assert main(["run", str(path)]) == USER_ERROR
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ppcl:")]
    assert "quant_aware = 'int2'; choose from none, fp8, int8, int4" in line
    with pytest.raises(ValueError, match="quantisation 'int2' is unknown; known: fp8, int8, int4"):
        train("distill-depth", without(new_run(), "distill-depth"), quant_aware="int2")


def test_weights_are_rounded_in_the_end_alone(monkeypatch):
    monkeypatch.undo()
    config = DistillDepthConfig(model="m", run="r", quant_aware="int8")
    assert [rounding(config, step, 400) for step in (0, 359, 360, 399)] == [
        NONE,
        NONE,
        "int8",
        "int8",
    ]
    assert rounding(DistillDepthConfig(model="m", run="r"), 399, 400) == NONE


@pytest.mark.parametrize("stage", STAGES)
def test_the_help_shows_it_and_the_estimate_counts_the_rounded_weights(
    stage, capsys, new_run, teacher_file
):
    assert main([stage, "--help"]) == 0
    assert "--quant-aware {none,fp8,int8,int4}" in capsys.readouterr().out
    common = {"model": teacher_file, "run": new_run().folder, "device": "cpu"}
    plain, aware = (needs(STAGES[stage][0](**common, quant_aware=kind)) for kind in (NONE, "int4"))
    assert aware.memory > plain.memory and aware.at_least == plain.at_least
