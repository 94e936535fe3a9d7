"""The demo's bundle: the one that comes with the pack, or where there is none yet, one trained for a few seconds."""

from __future__ import annotations

from pathlib import Path

from ppcl_engine.checkpoint import Weights
from ppcl_engine.config import CalibrateConfig, DistillDepthConfig, VariantsConfig
from ppcl_engine.config_files import ExportConfig
from ppcl_engine.demo.run import TEACHER, render_pictures
from ppcl_engine.plan import Interval, PruningPlan
from ppcl_engine.run import Run
from ppcl_engine.stages.calibrate import calibrate
from ppcl_engine.stages.distill_depth import distill_depth
from ppcl_engine.stages.export import export
from ppcl_engine.stages.variants import variants

SHIPPED = TEACHER.with_name("demo.ppcl.safetensors")
INTERVALS = tuple(Interval(first=u, last=u + 1) for u in (7, 11, 16, 21))
PICTURES = 64


def demo_bundle(folder: Path) -> Path:
    """Four students of the bundled teacher, closed-form corrections and two updates each."""
    if SHIPPED.exists():
        return SHIPPED
    common = {"model": TEACHER, "run": folder, "device": "cpu"}
    images = render_pictures(folder / "images", PICTURES, seed=0)
    calibrate(CalibrateConfig(**common, images=images, samples=PICTURES, batch=32))
    weights = Weights(TEACHER)
    plan = PruningPlan(
        architecture=weights.architecture.name, config=weights.config, num_blocks=weights.num_blocks,
        fingerprint=weights.fingerprint, intervals=INTERVALS,
    )  # fmt: skip
    Run(folder).plan.write_text(plan.to_json(), encoding="utf-8")
    distill_depth(DistillDepthConfig(**common, rounds=1, updates=2))
    variants(VariantsConfig(**common, samples=PICTURES // 2))
    return export(ExportConfig(**common))
