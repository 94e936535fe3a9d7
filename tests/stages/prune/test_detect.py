"""Detection finds runs of blocks that were planted, and only those."""

import json
from dataclasses import replace

import pytest
import torch

from ppcl_engine.algorithms.detection.closed_forms import closed_forms
from ppcl_engine.algorithms.detection.damage import Damage
from ppcl_engine.data.calibration import CalibrationSet, load_calibration
from ppcl_engine.models.streaming import StateStore, Teacher
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import Variant
from ppcl_engine.run import Run
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ...tiny.linear_blocks import make_linear, set_gates

# N strongly nonlinear, L a near-linear step; the probes replace what follows block u
PATTERN = "NNLLLNNLLN"
PLANTED = [(1, 4), (6, 8)]
REMOVE = sum(last - first for first, last in PLANTED)


def make_nonlinear(block: torch.nn.Module) -> None:
    """Large even steps: GELU far out on both sides is as good as an absolute value, which no line
    fits."""
    for mod, mlp in ((block.img_mod, block.img_mlp), (block.txt_mod, block.txt_mlp)):
        set_gates(mod, 1.0, 2.0)
        half = mlp.net[0].proj.weight[:64] * 3
        mlp.net[0].proj.weight.copy_(torch.cat([half, -half]))
        mlp.net[0].proj.bias.zero_()
        mlp.net[2].weight.copy_(mlp.net[2].weight[:, :64].repeat(1, 2))


@pytest.fixture(scope="module", params=[0, 1])
def planted(
    request, tmp_path_factory, make_model, save_model, make_run, calibration_of, run_stages
):
    """(teacher file, run folder with calibration and probes)"""
    seed = request.param
    model = make_model(seed=seed, num_layers=len(PATTERN))
    for block, kind in zip(model.transformer_blocks, PATTERN, strict=True):
        (make_linear if kind == "L" else make_nonlinear)(block)
    for linear in (model.img_in, model.txt_in):  # far from zero, layer norm is nearly linear
        linear.bias.copy_(4 * torch.randn(32, generator=torch.Generator().manual_seed(seed)))
    folder = tmp_path_factory.mktemp("planted")
    teacher = save_model(folder / "teacher.safetensors", model)
    calibration = calibration_of(teacher, batches=6, samples=12, text_tokens=8)
    run_stages(teacher, make_run(folder / "run", teacher, calibration), "probe")
    return teacher, folder / "run"


@pytest.mark.parametrize("method", ["ppcl", "budget"])
def test_the_planted_intervals_are_found_and_no_others(planted, run_stages, method):
    run = run_stages(*planted, "detect", method=method, remove=REMOVE, longest=5)
    result = json.loads(run.detection.read_text())
    plan = run.load_plan()
    assert [(i.first, i.last) for i in plan.intervals] == PLANTED
    assert all(i.stability == 1 for i in plan.intervals)
    assert result["method"] == plan.provenance["method"] == method
    assert all(0 < i.score < 1e-4 for i in plan.intervals)
    curves = TensorFile(run.curves)
    damage = curves.read("error").sum(-1) / curves.read("power").sum()
    # 0-1 and 1-5 hold a nonlinear block that would go
    assert damage[0, 1] > 1e-3 and damage[1, 4] > 1e-3


def test_budget_and_protection_are_kept(planted, run_stages):
    run = run_stages(*planted, "detect", method="budget", remove=3, longest=5, protect="3")
    assert [(i.first, i.last) for i in run.load_plan().intervals] == [(1, 2), (6, 8)]
    run = run_stages(*planted, "detect", method="ppcl", longest=5, protect="3")
    assert [(i.first, i.last) for i in run.load_plan().intervals] == [(1, 2), (6, 8)]
    with pytest.raises(ValueError, match="--protect '10': give block numbers from 0 to 9"):
        run_stages(*planted, "detect", protect="10")
    with pytest.raises(ValueError, match="9 blocks cannot be removed"):
        run_stages(*planted, "detect", remove=9, longest=5)


def test_students_in_closed_form_do_the_damage_that_was_measured(planted, run_stages):
    """Fitted on the first half of the batches and measured on the second, as detection does."""
    teacher_file, folder = planted
    plan = run_stages(*planted, "detect", remove=REMOVE, longest=5).load_plan()
    intervals = tuple(replace(i, correction="affine") for i in plan.intervals)
    plan = plan.with_parts(intervals=intervals)
    teacher = Teacher(Weights(teacher_file), torch.float32, "cpu", streamed=False)
    inputs = load_calibration(Run(folder).calibration).all_inputs()
    passed: list[int] = []
    with torch.no_grad():
        students = closed_forms(
            teacher, inputs[:3], intervals, StateStore(None), lambda: passed.append(1)
        )
        measured = Damage(teacher, students, plan, inputs[3:])
        for interval in intervals:
            alone = Variant(name=interval.name, intervals=(interval.name,))
            assert measured.of(alone) == pytest.approx(interval.score, rel=0.01)
    assert len(passed) == PLANTED[-1][1] + 1  # no further than the last interval


@pytest.mark.parametrize("method", ["ppcl", "budget"])
def test_explain_has_a_line_for_every_interval(planted, run_stages, capsys, method):
    run = run_stages(*planted, "detect", method=method, remove=REMOVE, longest=5, explain=True)
    printed = capsys.readouterr().out
    for first, last in PLANTED:
        of_it = [x for x in printed.splitlines() if x.startswith(f"{method} {first}-{last}: ")]
        assert len(of_it) == 1
    assert "ppcl 0-0: ends because D(0,1) =" in printed
    assert "ppcl 1-4: ends because D rises: D(1,5) =" in printed
    assert json.loads(run.detection.read_text())["explain"] == printed.splitlines()


def test_an_untrained_model_is_refused(tmp_path, make_model, save_model, make_run, run_stages):
    """Modulations that start at zero close every gate, so every block is the identity."""
    model = make_model()
    for block in model.transformer_blocks:
        set_gates(block.img_mod, 0, 0), set_gates(block.txt_mod, 0, 0)
    teacher = save_model(tmp_path / "teacher.safetensors", model)
    folder = make_run(tmp_path / "run", teacher)
    run_stages(teacher, folder, "probe")
    with pytest.raises(ValueError, match="curves are flat .* looks untrained"):
        run_stages(teacher, folder, "detect", method="ppcl")
    with pytest.raises(
        ValueError, match="every block behaves like a linear map: the model looks untrained"
    ):
        run_stages(teacher, folder, "detect", method="budget")
    assert not Run(folder).plan.exists()


def test_the_budget_needs_no_cka(planted, run_stages):
    """A model whose curves are flat, yet whose intervals cost different sums: measured curves with
    all CKA at 1."""
    run = run_stages(*planted, "detect", method="budget", remove=REMOVE, longest=5)
    file = TensorFile(run.curves)
    flat = {**file.read_all(), "cka": torch.where(file.read("cka").isnan(), torch.nan, 1.0)}
    write_tensors(run.curves, flat, file.metadata, gaps=True)
    run_stages(*planted, "detect", method="budget", remove=REMOVE, longest=5)
    result = json.loads(run.detection.read_text())
    assert [(row["first"], row["last"]) for row in result["intervals"]] == PLANTED
    assert (
        result["explain"][0]
        == "ppcl finds nothing: the CKA curves are flat (largest first difference 0.0e+00)"
    )
    with pytest.raises(ValueError, match="curves are flat"):
        run_stages(*planted, "detect", method="ppcl", remove=REMOVE, longest=5)
    run.curves.unlink()  # the fixture is shared


def test_more_tokens_than_a_picture_has_are_all_of_them(planted, run_stages):
    run_stages(*planted, "detect", remove=REMOVE, longest=5, tokens=10**6)
    run = Run(planted[1])
    assert run.load_plan().intervals
    run.curves.unlink()  # the fixture is shared


def test_what_is_missing_is_named(tmp_path, teacher_file, make_run, run_stages, calibration_of):
    folder = make_run(tmp_path / "run", teacher_file)
    with pytest.raises(ValueError, match="block_001.safetensors does not exist; run probe first"):
        run_stages(teacher_file, folder, "detect")
    calibration = calibration_of(teacher_file, batches=1)
    make_run(folder, teacher_file, CalibrationSet(calibration.batches, calibration.origin))
    with pytest.raises(ValueError, match="at least two calibration batches"):
        run_stages(teacher_file, folder, "detect")
