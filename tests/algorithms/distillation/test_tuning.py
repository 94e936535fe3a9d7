"""Averages, saves and gradients of the training on the velocity, each against a plain
recomputation."""

from __future__ import annotations

import copy
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ppcl_engine.__main__ import main
from ppcl_engine.algorithms.distillation.losses import velocity_loss
from ppcl_engine.algorithms.distillation.trainable import TrainableParts, projections_of, twin
from ppcl_engine.algorithms.distillation.tuning import AveragedTrainer
from ppcl_engine.algorithms.distillation.walks import OUTER, ResidentWalk, Rules
from ppcl_engine.models.assembly import open_variant
from ppcl_engine.models.layout import layout_of
from ppcl_engine.models.streaming import Teacher, embed_with
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import Variant
from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import FinetuneConfig, PolishConfig
from ppcl_engine.stages.prune.finetune import variant_chain
from ppcl_engine.stages.prune.polish import subset, subset_chain
from ppcl_engine.stages.run_students import RunStudents
from ppcl_engine.system.tensor_files import TensorFile

from ...tiny.trained_run import PROJECTIONS, SMALL, SMALLEST, write_parts

SUBSETS = [
    (SMALL, SMALLEST),
    (("1-2",), SMALLEST),
    (("3-4",), SMALLEST),
    ((), SMALLEST),
    (SMALL, ()),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory, teacher_file, make_run):
    """(run, plan, a teacher): students and projections of every kind."""
    run = Run(make_run(tmp_path_factory.mktemp("world"), teacher_file))
    plan = write_parts(run, teacher_file)
    return run, plan, Teacher(Weights(teacher_file), torch.float32, "cpu", streamed=False)


@pytest.fixture
def parts(world):
    run, plan, teacher = world
    students = RunStudents(run, teacher.config, teacher.architecture)
    return TrainableParts(
        plan, plan.everything(), teacher.architecture, students, "cpu"
    ).requires_grad_(True)


def training(module: nn.Module, weight_decay: float, ema: float, *parts: str) -> AveragedTrainer:
    rules = Rules(weight_decay=weight_decay, ema=ema)
    return AveragedTrainer(ResidentWalk(module, parts or [OUTER], rules))


def update(trainer: AveragedTrainer, loss: torch.Tensor, *parts: str) -> None:
    """A step of these parts on a loss that is there already."""
    chain = SimpleNamespace(parts=parts or [OUTER], loss=lambda checkpointing: loss)
    trainer.update(chain, 0.1, "here")


def tensors_of(path) -> dict[str, torch.Tensor]:
    return TensorFile(path).read_all()


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("ema", [0.9, 0.5])
def test_the_average_is_a_plain_recomputation(tmp_path, ema):
    torch.manual_seed(0)
    linear, batches = nn.Linear(4, 3), torch.randn(12, 5, 4)
    trainer = training(linear, 0.1, ema)
    expected = {name: p.detach().clone() for name, p in linear.named_parameters()}
    for step, batch in enumerate(batches):
        update(trainer, linear(batch).square().mean())
        decay = min(ema, (1 + step) / (10 + step))
        for name, p in linear.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    used = trainer.used(OUTER)
    assert all(torch.allclose(used[name], expected[name], atol=1e-6) for name in expected)
    assert not torch.allclose(expected["weight"], linear.weight, atol=1e-3)
    first, second = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    trainer.save(first, "{}")
    other = training(nn.Linear(4, 3), 0.1, ema)
    other.restore(first)
    other.save(second, "{}")
    assert first.read_bytes() == second.read_bytes()


def test_without_an_average_the_last_weights_are_used(tmp_path):
    linear = nn.Linear(4, 3)
    trainer = training(linear, 0.1, 0.0)
    update(trainer, linear(torch.ones(4)).sum())
    assert torch.equal(trainer.used(OUTER)["weight"], linear.weight)
    trainer.save(tmp_path / "x.safetensors", "{}")
    assert not any(name.startswith("raw.") for name in tensors_of(tmp_path / "x.safetensors"))


def test_each_parameter_counts_its_own_updates(tmp_path):
    """A part that was off takes its next step as if the others' steps had not been; so it does
    after a restore."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})
    halfway, ends = tmp_path / "half.safetensors", []

    def train(first: int, module: nn.Module, trainer: AveragedTrainer) -> None:
        for step in range(first, 9):
            if step == 6 and not halfway.exists():
                trainer.save(halfway, "{}")
            part = "ab"[step % 3 == 2]
            update(trainer, module[part](torch.ones(3)).square().sum(), f"{part}.")
        ends.append(tmp_path / f"end_{first}.safetensors")
        trainer.save(ends[-1], "{}")

    whole, resumed = copy.deepcopy(module), copy.deepcopy(module)
    train(0, whole, training(whole, 0.0, 0.9, "a.", "b."))
    trainer = training(resumed, 0.0, 0.9, "a.", "b.")
    trainer.restore(halfway)
    train(6, resumed, trainer)
    assert tensors_of(ends[1])["counts"].tolist() == [6, 6, 3, 3]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_each_part_is_clipped_by_itself():
    """A part's step is the one that it takes alone, however large the gradients of others are."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})
    alone, x = copy.deepcopy(module), torch.ones(3)
    update(
        training(module, 0.0, 0.0, "a.", "b."),
        9 * module["a"](x) + 1e4 * module["b"](x),
        "a.",
        "b.",
    )
    update(training(alone, 0.0, 0.0, "a.", "b."), 9 * alone["a"](x), "a.")
    assert torch.equal(module["a"].weight, alone["a"].weight)


@pytest.mark.parametrize("intervals, sites", SUBSETS)
def test_a_live_subset_is_the_assembled_variant_and_its_gradients_reach_the_parts(
    world, parts, padded_inputs, intervals, sites
):
    """Every tensor of the parts gets the gradient that it has in an assembled model of its own."""
    run, plan, teacher = world
    variant, inputs = Variant(name="x", intervals=intervals, sites=sites), padded_inputs(3)
    students = RunStudents(run, teacher.config, teacher.architecture)
    loss = subset_chain(teacher, parts, layout_of(plan, variant), inputs).loss()
    loss.backward()
    model = open_variant(
        teacher.weights, students, plan, variant, torch.float32, "cpu"
    ).requires_grad_(True)
    target = teacher.architecture.call(_teacher_model(teacher), inputs)
    expected = velocity_loss(teacher.architecture.call(model, inputs), target)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    compared = 0
    for place in layout_of(plan, variant).places:
        block = model.get_submodule(
            teacher.architecture.block_prefix(teacher.config, place.index)[:-1]
        )
        for name, ours, theirs in _pairs(teacher.architecture, parts, place, block):
            assert theirs is None or torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7), (
                place.name,
                name,
            )
            compared += theirs is not None
    assert compared == sum(grad is not None for grad in (p.grad for p in parts.parameters()))


def _teacher_model(teacher):
    blocks = [teacher.block(i) for i in range(teacher.num_blocks)]
    return teacher.architecture.assemble(copy.deepcopy(teacher.outer), teacher.config, blocks)


def _pairs(architecture, parts, place, block):
    """(name, gradient of the parts' tensor, that of the model's); of a cut tensor the rows that are
    left."""
    if place.interval:
        for name, parameter in parts.students[place.name].named_parameters():
            theirs = dict(block.named_parameters()).get(name)
            if theirs is None or theirs.grad is None:
                assert parameter.grad is None, name
            else:
                rows = len(theirs)
                assert not parameter.grad[rows:].any()
                yield name, parameter.grad[:rows], theirs.grad
    for kind in place.projections:
        for part, linear in parts.projections[f"{place.name}:{kind}"].items():
            theirs = block.get_submodule(architecture.projection_names[kind][part])
            yield f"{kind}.{part}", linear.weight.grad, theirs.weight.grad
            yield f"{kind}.{part}", linear.bias.grad, theirs.bias.grad


@pytest.mark.parametrize("intervals, sites", SUBSETS)
@pytest.mark.parametrize("streamed", [False, True])
def test_checkpointing_and_streaming_change_no_bit_of_a_gradient(
    world, teacher_file, parts, padded_inputs, intervals, sites, streamed
):
    _, plan, teacher = world
    layout = layout_of(plan, Variant(name="x", intervals=intervals, sites=sites))
    plain = subset_chain(teacher, parts, layout, padded_inputs(3)).loss()
    plain.backward()
    expected = gradients(parts)
    parts.zero_grad()
    teacher = Teacher(Weights(teacher_file), torch.float32, "cpu", streamed)
    again = subset_chain(teacher, parts, layout, padded_inputs(3)).loss(checkpointing=True)
    again.backward()
    assert torch.equal(again, plain) and gradients(parts).keys() == expected.keys()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(parts).items())


def test_checkpointing_the_whole_model_changes_no_bit_of_a_gradient(world, padded_inputs):
    run, plan, teacher = world
    students, variant = (
        RunStudents(run, teacher.config, teacher.architecture),
        plan.variant("smallest"),
    )
    model = open_variant(
        teacher.weights, students, plan, variant, torch.float32, "cpu"
    ).requires_grad_(True)
    found = []
    for checkpointing in (False, True):
        model.zero_grad()
        begin = partial(embed_with, teacher, model, padded_inputs(3))
        chain = variant_chain(teacher, model, layout_of(plan, variant), begin, torch.sum)
        velocity = chain.velocity(checkpointing)
        velocity.square().sum().backward()
        found.append((velocity.detach(), gradients(model)))
    (plain, expected), (again, ours) = found
    assert torch.equal(plain, again) and ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    with torch.no_grad():
        assert torch.equal(teacher.architecture.call(model, padded_inputs(3)), plain)


def test_a_twin_shares_tensors_and_nothing_else(world, architecture):
    teacher = world[2]
    block = twin(teacher.block(0))
    assert [id(p) for p in block.parameters()] == [id(p) for p in teacher.block(0).parameters()]
    architecture.project_ffn(block, "ffn_image", "paper")
    assert not isinstance(teacher.block(0).img_mlp, nn.Linear)


def test_every_projection_that_a_subset_may_need(world):
    _, plan, _ = world
    assert set(projections_of(plan, plan.everything())) == set(PROJECTIONS)
    without = Variant(name="x", intervals=("3-4",), sites=SMALLEST)
    assert set(projections_of(plan, without)) == PROJECTIONS.keys() - {("1-2", "ffn_image")}
    assert set(projections_of(plan, Variant(name="x", sites=("text:3-4",)))) == {
        ("3", "text"),
        ("4", "text"),
    }


def test_subsets_are_drawn_from_seed_and_step(world):
    _, plan, _ = world
    everything, common = plan.everything(), {"model": "m", "run": "r"}
    config = PolishConfig(**common, all_on=0.25)
    drawn = [subset(plan, everything, config, step) for step in range(400)]
    assert drawn == [subset(plan, everything, config, step) for step in range(400)]
    assert drawn != [
        subset(plan, everything, PolishConfig(**common, all_on=0.25, seed=1), s) for s in range(400)
    ]
    assert 70 <= sum(v == everything for v in drawn) <= 150
    assert 120 <= sum("3-4" in v.intervals for v in drawn if v != everything) <= 180
    for variant in drawn:
        assert any(not place.is_teacher for place in layout_of(plan, variant).places)


@pytest.mark.parametrize("stage", ["polish", "finetune"])
def test_the_dry_run_counts_the_optimiser_too(stage, capsys, tmp_path):
    """For 20 B parameters: 20 bytes each that is trained, which is half of them where no plan says how
    many."""
    assert main([stage, "--model", "qwen_image", "--run", str(tmp_path), "--dry-run"]) == 0
    resident = re.search(r"resident +([0-9.]+)", capsys.readouterr().out)
    weights = 81.7
    assert float(resident[1]) > weights + (5 if stage == "polish" else 200)


@pytest.mark.parametrize("wrong", [{"ema": 1.0}, {"ema": -0.1}, {"steps": 0}, {"save_every": 0}])
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(
        ValueError, match="--(ema|steps|save-every) .*: choose a (whole )?number from [01] to "
    ):
        FinetuneConfig(model="m", run="r", **wrong)
