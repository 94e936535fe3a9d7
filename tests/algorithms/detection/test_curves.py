"""Alignment and damage of every interval: what the method says, in as few reads as memory allows."""

import json

import pytest
import torch

from ppcl_engine.algorithms.detection.alignment import cka, linear_gram
from ppcl_engine.algorithms.detection.curves import block_passes
from ppcl_engine.algorithms.detection.stream_maps import apply_maps, load_probe
from ppcl_engine.algorithms.least_squares import RIDGE, InputMoments, NormalEquations
from ppcl_engine.architectures.qwen_image import QwenImage
from ppcl_engine.models.streaming import Teacher
from ppcl_engine.run import Run
from ppcl_engine.system.tensor_files import TensorFile


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


@pytest.fixture(scope="module")
def boundaries(architecture, model, teacher_file, calibration_of) -> list[list]:
    """The teacher's states before and after each block, batch by batch."""
    rows = []
    for inputs in calibration_of(teacher_file).all_inputs():
        states = [architecture.embed(model, inputs)]
        for block in model.transformer_blocks:
            states.append(architecture.run_block(block, states[-1]))
        rows.append(states)
    return rows


@pytest.fixture(scope="module")
def onward(architecture, model):
    """Runs the teacher's blocks from this one on."""

    def run(state, first: int):
        for block in model.transformer_blocks[first:]:
            state = architecture.run_block(block, state)
        return state

    return run


@pytest.fixture(scope="module", params=[False, True], ids=["end to end", "local"])
def detected(request, tmp_path_factory, teacher_file, probed, run_stages) -> tuple[Run, bool]:
    """The run, and whether its alignment was measured where the interval ends."""
    folder = copied(probed, tmp_path_factory.mktemp("detected")).folder
    return run_stages(teacher_file, folder, "detect", tokens=6, local=request.param), request.param


def test_alignment_is_what_the_method_says(detected, boundaries, onward):
    """Block 1 real, 2 and 3 by their probes, then the teacher."""
    run, local = detected
    probed_states = []
    for states in boundaries:
        state = states[2]
        for block in (2, 3):
            state = apply_maps(state, load_probe(run.probe(block)))
        probed_states.append(state if local else onward(state, 4))
    ours, theirs = (
        linear_gram(torch.cat([s.image.flatten(0, 1) for s in rows]))
        for rows in (probed_states, [states[4 if local else 6] for states in boundaries])
    )
    expected = float(cka(ours, theirs))
    assert float(TensorFile(run.curves).read("cka")[1, 2, 0]) == pytest.approx(expected, abs=1e-6)
    assert expected < 0.999


def test_damage_is_what_the_method_says(detected, boundaries, onward, architecture, model):
    """The best affine map, fitted on two batches, instead of 1-3; seen on the others."""
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
        ours = architecture.finish(model, onward(apply_maps(states[2], maps), 4))
        error += float((ours - exact).square().sum())
        power += float(exact.square().sum())
    curves = TensorFile(detected[0].curves)
    damage = curves.read("error")[1, 2].sum() / curves.read("power").sum()
    assert float(damage) == pytest.approx(error / power, rel=1e-4)
    assert damage > 0.01


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
