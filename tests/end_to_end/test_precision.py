"""Training in bfloat16 at the default learning rate: the weights move, and end as good as
float32's."""

from __future__ import annotations

import pytest
import torch

from benchmarks import precision
from benchmarks.precision import last_quarter, watching
from ppcl_engine.run import Run
from ppcl_engine.system.tensor_files import TensorFile

from ..benchmarks.quick import quick_teacher, run
from ..tiny.trained_run import write_parts

SETTINGS = {  # everything else, the learning rate too, is the default
    "distill_depth": {"rounds": 1, "updates": 48, "correction": "none"},
    "distill_width": {"rounds": 1, "updates": 32},
    "polish": {"steps": 10, "warm_up": 2, "all_on": 1.0},
    "finetune": {"steps": 10, "warm_up": 2, "variant": "smallest"},
}


@pytest.fixture
def trained(tmp_path, teacher_file, make_run, calibration_of):
    """Trains a stage; returns what its trainers did, and the run folder."""

    def train(stage: str, **settings):
        name = "_".join(map(str, (stage, *settings.values())))
        folder = make_run(tmp_path / name, teacher_file, calibration_of(teacher_file))
        write_parts(Run(folder), teacher_file)
        fresh = {"distill_depth": Run(folder).students, "distill_width": Run(folder).projections}
        for path in fresh[stage].iterdir() if stage in fresh else ():
            path.unlink()
        if stage == "distill_depth":
            plan = Run(folder).load_plan().with_parts(sites=(), variants=())
            Run(folder).plan.write_text(plan.to_json())
        work, kind = precision.STAGES[stage]
        with watching() as watched:
            work(
                kind(
                    model=teacher_file, run=folder, device="cpu", **{**SETTINGS[stage], **settings}
                )
            )
        return watched, folder

    return train


@pytest.mark.parametrize("stage", SETTINGS)
def test_training_in_bfloat16_at_the_default_rate_trains(trained, stage):
    """As many weights move as in float32, and they lower the loss by as much: on the same batches,
    below what it is there at rate 0."""
    gains, shares = {}, {}
    for dtype in ("float32", "bfloat16"):
        (still, _), (moving, _) = (
            trained(stage, dtype=dtype, learning_rate=0.0),
            trained(stage, dtype=dtype),
        )
        gains[dtype] = last_quarter(still.losses) - last_quarter(moving.losses)
        shares[dtype] = moving.moved_share
    print(stage, gains, shares)
    assert shares["bfloat16"] > 0.99 * shares["float32"] > 0.5
    assert gains["bfloat16"] == pytest.approx(gains["float32"], rel=0.3) and gains["float32"] > 0


@pytest.mark.parametrize("stage", ["distill_depth", "distill_width"])
def test_files_of_a_training_in_bfloat16_hold_float32(trained, stage):
    folder = trained(stage, dtype="bfloat16", updates=2)[1]
    files = list(Run(folder).students.iterdir()) + list(Run(folder).projections.iterdir())
    for path in files if stage == "distill_depth" else Run(folder).projections.iterdir():
        file = TensorFile(path)
        assert {file.dtype(name) for name in file.keys()} == {torch.float32}, path.name


def test_the_benchmark(tmp_path):
    values = run(precision, tmp_path, "--teacher", quick_teacher(tmp_path), "--folder", tmp_path)
    for stage in precision.STAGES:
        assert (
            values[stage]["moved_share"]
            > 10 * values[stage]["weights_in_bfloat16"]["moved_share"]
            > 0
        )
        assert values[stage]["loss_ratio_to_float32"] > 0
    assert not list(tmp_path.glob("ppcl_precision_*"))
