"""Detection finds runs of blocks that were planted, and only those."""

import json

import pytest
import torch

from ppcl_engine.algorithms.detection.alignment import cka, linear_gram
from ppcl_engine.algorithms.detection.chains import ChainBatch, grouped
from ppcl_engine.algorithms.detection.curves import block_passes
from ppcl_engine.algorithms.detection.stream_maps import apply_maps, load_probe
from ppcl_engine.algorithms.least_squares import RIDGE, InputMoments, NormalEquations
from ppcl_engine.architectures.qwen_image import QwenImage
from ppcl_engine.data.calibration import CalibrationSet
from ppcl_engine.models.streaming import Teacher
from ppcl_engine.run import Run
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

# N strongly nonlinear, L a near-linear step; the probes replace what follows block u
PATTERN = "NNLLLNNLLN"
PLANTED = [(1, 4), (6, 8)]
REMOVE = sum(last - first for first, last in PLANTED)


def set_gates(mod: torch.nn.Module, attention: float, mlp: float) -> None:
    """Constant modulation: no shift, no scale, these gates."""
    width = mod[1].out_features // 6
    mod[1].weight.zero_(), mod[1].bias.zero_()
    mod[1].bias[2 * width : 3 * width] = attention
    mod[1].bias[5 * width :] = mlp


def make_linear(block: torch.nn.Module) -> None:
    """No attention; the MLP's inputs lie so far right that GELU is the identity there."""
    for mod, mlp in ((block.img_mod, block.img_mlp), (block.txt_mod, block.txt_mlp)):
        set_gates(mod, 0.0, 0.7)
        mlp.net[0].proj.bias.fill_(8.0)
        mlp.net[2].bias.copy_(-mlp.net[2].weight @ mlp.net[0].proj.bias)


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


@pytest.mark.parametrize("method", ["ppcl", "budget"])
def test_explain_has_a_line_for_every_interval(planted, run_stages, capsys, method):
    run = run_stages(*planted, "detect", method=method, remove=REMOVE, longest=5, explain=True)
    printed = capsys.readouterr().out
    for first, last in PLANTED:
        assert (
            sum(line.startswith(f"{method} {first}-{last}: ") for line in printed.splitlines()) == 1
        )
    assert (
        "ppcl 0-0: ends because D(0,1) =" in printed
        and "ppcl 1-4: ends because D rises: D(1,5) =" in printed
    )
    assert json.loads(run.detection.read_text())["explain"] == printed.splitlines()


@pytest.fixture(scope="module")
def probed(tmp_path_factory, teacher_file, make_run, run_stages):
    return run_stages(
        teacher_file, make_run(tmp_path_factory.mktemp("probed"), teacher_file), "probe"
    )


def copied(probed: Run, folder) -> Run:
    for path in (probed.calibration, *probed.probes.iterdir()):
        target = folder / path.relative_to(probed.folder)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    return Run(folder)


@pytest.mark.parametrize("local", [False, True])
def test_curves_are_what_the_method_says(
    tmp_path, architecture, model, teacher_file, probed, calibration_of, run_stages, local
):
    """cka: block 1 real, 2 and 3 by their probes, then the teacher. damage: the best affine map of
    1-3 instead."""
    run = run_stages(teacher_file, copied(probed, tmp_path).folder, "detect", tokens=6, local=local)
    boundaries = []
    for inputs in calibration_of(teacher_file).all_inputs():
        states = [architecture.embed(model, inputs)]
        for block in model.transformer_blocks:
            states.append(architecture.run_block(block, states[-1]))
        boundaries.append(states)

    def onward(state, first):
        for block in model.transformer_blocks[first:]:
            state = architecture.run_block(block, state)
        return state

    probed_states = []
    for states in boundaries:
        state = apply_maps(
            apply_maps(states[2], load_probe(run.probe(2))), load_probe(run.probe(3))
        )
        probed_states.append(state if local else onward(state, 4))
    ours, theirs = (
        linear_gram(torch.cat([s.image.flatten(0, 1) for s in rows]))
        for rows in (probed_states, [states[4 if local else 6] for states in boundaries])
    )
    curves = TensorFile(run.curves)
    assert float(curves.read("cka")[1, 2, 0]) == pytest.approx(float(cka(ours, theirs)), abs=1e-6)
    assert float(cka(ours, theirs)) < 0.999

    maps = {}
    for stream in ("image", "text"):
        equations = NormalEquations(32, 32)
        for states in boundaries[:2]:
            x, y = states[2].real_tokens(stream), states[4].real_tokens(stream)
            equations.add(x, y - x)
        solution = equations.solve(RIDGE)
        maps[stream] = (solution.weight, solution.bias)
    error = power = 0.0
    for states in boundaries[2:]:
        exact = architecture.finish(model, states[6])
        error += float(
            (architecture.finish(model, onward(apply_maps(states[2], maps), 4)) - exact)
            .square()
            .sum()
        )
        power += float(exact.square().sum())
    damage = curves.read("error")[1, 2].sum() / curves.read("power").sum()
    assert float(damage) == pytest.approx(error / power, rel=1e-4) and damage > 0.01


@pytest.mark.parametrize("local", [False, True])
def test_block_passes_is_the_count_of_blocks_that_ran(
    tmp_path, teacher_file, probed, run_stages, monkeypatch, local
):
    """Held-out batches take both curves, the others only the alignment."""
    counted, run_block = [], QwenImage.run_block
    monkeypatch.setattr(
        QwenImage, "run_block", lambda *arguments: counted.append(1) or run_block(*arguments)
    )
    run = run_stages(teacher_file, copied(probed, tmp_path).folder, "detect", local=local)
    full_curves = 0 if local else 1
    assert len(counted) == 2 * block_passes(6, 4, full_curves) + 2 * block_passes(
        6, 4, full_curves + 1
    )
    assert json.loads(run.detection.read_text())["block_passes_per_batch"] == block_passes(
        6, 4, full_curves + 1
    )
    # pairs (0,1) (0,2) (1,2): one block is behind the first
    assert block_passes(3, 3, 1) == 3 + (1 + 0 + 0)


def blocks_read(groups, blocks: int) -> int:
    """By the sweep and by all walks."""
    return blocks + sum(blocks - 1 - group[0].u for group in groups)


def test_parts_share_a_walk_as_far_as_their_states_fit():
    parts = [
        ChainBatch(u=u, end=u + 1, batch=batch, bytes=3.0) for u in range(3) for batch in range(2)
    ]
    by_limit = {
        limit: [len(group) for group in grouped(parts, limit)] for limit in (0, 5, 6, 9, 18, 100)
    }
    assert by_limit == {0: [1] * 6, 5: [1] * 6, 6: [2, 2, 2], 9: [3, 3], 18: [6], 100: [6]}
    assert blocks_read(grouped(parts, 100), 10) == 10 + 9 and blocks_read(
        grouped(parts, 0), 10
    ) == 10 + 2 * (9 + 8 + 7)


@pytest.mark.parametrize("local", [False, True])
def test_any_cache_gives_the_same_curves_in_as_few_reads_as_it_holds(
    tmp_path, teacher_file, probed, run_stages, monkeypatch, local
):
    """With room for all, the blocks are read twice: by the teacher's sweep, and by the walk of all
    chains."""
    curves, reads, loaded, load = {}, {}, [], Teacher._load
    monkeypatch.setattr(
        Teacher, "_load", lambda self, index: loaded.append(index) or load(self, index)
    )
    for cache_gb in (8.0, 1e-4, 1e-6):
        loaded.clear()
        run = copied(probed, tmp_path / str(cache_gb))
        run_stages(
            teacher_file, run.folder, "detect", local=local, streamed=True, cache_gb=cache_gb
        )
        curves[cache_gb], reads[cache_gb] = run.curves.read_bytes(), len(loaded)
        assert not run.states.exists() or not list(run.states.iterdir())
    resident = copied(probed, tmp_path / "resident")
    run_stages(teacher_file, resident.folder, "detect", local=local)
    assert set(curves.values()) == {resident.curves.read_bytes()}
    assert (
        reads[8.0] == 6 + 5
        and reads[1e-6] == 6 + 4 * (5 + 4 + 3 + 2 + 1) > reads[1e-4] > reads[8.0]
    )


def test_what_a_block_gives_is_summed_once_for_all_its_pairs(
    tmp_path, teacher_file, probed, run_stages, monkeypatch
):
    """X^T X and its factor hang on u and the stream alone."""
    made, factored = [], []
    init, factor = InputMoments.__init__, torch.linalg.cholesky_ex
    monkeypatch.setattr(
        InputMoments, "__init__", lambda self, *given: made.append(1) or init(self, *given)
    )
    monkeypatch.setattr(
        torch.linalg, "cholesky_ex", lambda matrix: factored.append(1) or factor(matrix)
    )
    run_stages(teacher_file, copied(probed, tmp_path).folder, "detect")
    # of block 4 only the image: nothing reads the last text
    assert len(made) == len(factored) == 4 * 2 + 1


def test_curves_are_measured_once_and_again_for_other_probes(
    tmp_path, teacher_file, probed, run_stages
):
    run = run_stages(teacher_file, copied(probed, tmp_path).folder, "detect", method="budget")
    measured = run.curves.stat().st_mtime_ns, run.curves.read_bytes()
    run_stages(teacher_file, run.folder, "detect", method="ppcl", remove=1)
    assert (run.curves.stat().st_mtime_ns, run.curves.read_bytes()) == measured
    run_stages(teacher_file, run.folder, "probe", "detect", ridge=1e-1)
    assert not torch.equal(
        TensorFile(run.curves).read("cka").nan_to_num(), _tensor(measured[1], tmp_path)
    )


def _tensor(content: bytes, folder) -> torch.Tensor:
    (folder / "old").write_bytes(content)
    return TensorFile(folder / "old").read("cka").nan_to_num()


def test_the_rbf_kernel_gives_other_curves(tmp_path, teacher_file, probed, run_stages):
    tables = []
    for kernel in ("linear", "rbf"):
        run = run_stages(teacher_file, copied(probed, tmp_path).folder, "detect", kernel=kernel)
        tables.append(TensorFile(run.curves).read("cka")[:, :, 0])
    assert torch.equal(tables[0].isnan(), tables[1].isnan())
    assert 1e-3 < float((tables[0] - tables[1]).abs().nan_to_num().max()) < 1
    pairs = [[k - u < 4 and u < k for k in range(u, u + 4)] for u in range(6)]
    assert (~tables[0].isnan()).tolist() == [
        [ok and u + j < 6 for j, ok in enumerate(row)] for u, row in enumerate(pairs)
    ]


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
        ValueError, match="no block can be told from a linear map: the model looks untrained"
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


def test_what_is_missing_is_named(tmp_path, teacher_file, make_run, run_stages, calibration_of):
    folder = make_run(tmp_path / "run", teacher_file)
    with pytest.raises(ValueError, match="block_001.safetensors does not exist; run probe first"):
        run_stages(teacher_file, folder, "detect")
    calibration = calibration_of(teacher_file, batches=1)
    make_run(folder, teacher_file, CalibrationSet(calibration.batches, calibration.origin))
    with pytest.raises(ValueError, match="at least two calibration batches"):
        run_stages(teacher_file, folder, "detect")
