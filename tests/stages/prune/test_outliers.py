"""One channel 1,000 or 10,000 times as large as the others, as real residual streams have: every
closed form still sees the others.

The teacher's blocks are linear in all other channels, so a good fit leaves next to nothing of any
channel; a ridge that the large channel sets leaves nearly everything of the others.
"""

from __future__ import annotations

import json

import pytest
import torch

from ppcl_engine.architectures.qwen_image import QwenImage
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import PruningPlan, parse_intervals
from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import DistillWidthConfig
from ppcl_engine.stages.prune.distill_width import distill_width
from ppcl_engine.system.tensor_files import TensorFile

from ...tiny.linear_blocks import make_linear
from ...tiny.models import tiny_model

CHANNEL, OFFSET, SPREAD = 3, 5.0, 0.05
ENOUGH = 0.01


def plant(model: torch.nn.Module, size: float) -> None:
    """Channel 3 lies `size` * OFFSET away from zero and varies by `size` * SPREAD. Layer norm makes
    the others that much smaller, and the modulation that much larger again."""
    for linear in (model.img_in, model.txt_in):
        linear.weight[CHANNEL] *= size * SPREAD
        linear.bias[CHANNEL] = size * OFFSET
    for block in model.transformer_blocks:
        make_linear(block)
        for mod in (block.img_mod, block.txt_mod):
            # of the second half: shift, scale, gate of the MLP
            scale = mod[1].bias[4 * 32 : 5 * 32]
            scale[:] = size * OFFSET / 32**0.5 - 1
            scale[CHANNEL] = 0


@pytest.fixture(scope="module", params=[1e3, 1e4])
def planted(request, tmp_path_factory, save_model, make_run, calibration_of, run_stages):
    """(teacher file, run folder with a calibration and probes)"""
    with torch.no_grad():
        model = tiny_model(QwenImage())
        plant(model, request.param)
    folder = tmp_path_factory.mktemp("planted")
    teacher = save_model(folder / "teacher.safetensors", model)
    calibration = calibration_of(teacher, batches=6, samples=12, text_tokens=8)
    run_stages(teacher, make_run(folder / "run", teacher, calibration), "probe")
    return teacher, Run(folder / "run")


def left(fits: dict[str, dict]) -> float:
    """The error left in the median channel. The large channel shows rounding alone: its float step is
    a millionth of its size."""
    assert all(fit["median"] <= fit["worst"] for fit in fits.values())
    return max(fit["median"] for fit in fits.values())


def plan_of(teacher, intervals: str = "") -> PruningPlan:
    weights = Weights(teacher)
    return PruningPlan(
        architecture=weights.architecture.name,
        config=weights.config,
        num_blocks=weights.num_blocks,
        fingerprint=weights.fingerprint,
        intervals=parse_intervals(intervals),
    )


def begun_with(path) -> dict[str, dict]:
    return json.loads(TensorFile(path).metadata["fit"])


def test_probes_see_every_channel(planted):
    _, run = planted
    for block in range(6):
        report = json.loads(TensorFile(run.probe(block)).metadata["report"])
        assert left(report) < ENOUGH and all(fit["held_out"] < ENOUGH for fit in report.values())


def test_detection_and_corrections_see_every_channel(planted, run_stages):
    teacher, run = planted
    run_stages(teacher, run.folder, "detect", remove=3)
    fits = json.loads(run.detection.read_text())["fits"]
    for row in fits:
        assert left({s: row[s] for s in ("image", "text") if s in row}) < ENOUGH
    assert TensorFile(run.curves).read("fit")[1, 3, :, 1].max() < ENOUGH
    run.plan.write_text(plan_of(teacher, "1-3").to_json())
    run_stages(teacher, run.folder, "distill_depth", rounds=1, updates=1, learning_rate=0.0)
    assert left(begun_with(run.student("1-3"))) < ENOUGH


@pytest.mark.parametrize("form", ["paper", "gated"])
def test_width_projections_see_every_channel(planted, tmp_path, form):
    teacher, probed = planted
    run = Run(tmp_path)
    run.calibration.symlink_to(probed.calibration)
    run.plan.write_text(plan_of(teacher).to_json())
    common = {"model": teacher, "run": run.folder, "device": "cpu", "rounds": 0}
    distill_width(DistillWidthConfig(**common, sites="ffn_image:0 ffn_text:1 text:3-4", form=form))
    files = list(run.projections.iterdir())
    assert len(files) == 4 and all(left(begun_with(path)) < ENOUGH for path in files)
