"""`ppcl demo`: the whole method on a bundled teacher, from rendered pictures to a report."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from ..run import Run
from ..settings.assess_settings import DemoConfig, EvaluateConfig
from ..settings.convert_settings import ExportConfig
from ..settings.prune_settings import (
    CalibrateConfig,
    DetectConfig,
    DetectWidthConfig,
    DistillDepthConfig,
    DistillWidthConfig,
    PolishConfig,
    ProbeConfig,
    VariantsConfig,
)
from ..stages.assess.evaluate import evaluate_with
from ..stages.convert.export import export
from ..stages.prune.calibrate import calibrate
from ..stages.prune.detect import detect
from ..stages.prune.detect_width import detect_width
from ..stages.prune.distill_depth import distill_depth
from ..stages.prune.distill_width import distill_width
from ..stages.prune.polish import polish
from ..stages.prune.probe import probe
from ..stages.prune.variants import variants
from ..system.atomic import write_text
from ..system.outputs import check_folder
from ..system.run_lock import holding
from .bundled import bundled, render_pictures
from .first_pictures import STEPS, first_pictures, show_in_browser

FOLDERS = {"qwen": Path("runs/demo"), "flux": Path("runs/demo_flux")}
FULL_SIZE = {
    "pictures": 480,
    "batch": 48,
    "bootstrap": 200,
    "longest": 8,
    "rounds": 10,
    "stock_rounds": 3,
    "depth_updates": 40,
    "weighed": 48,
    "width_updates": 20,
    "steps": 120,
    "drawn": 20,
}
QUICK = {
    "pictures": 16,
    "batch": 4,
    "bootstrap": 5,
    "longest": 2,
    "rounds": 1,
    "stock_rounds": 1,
    "depth_updates": 2,
    "weighed": 4,
    "width_updates": 2,
    "steps": 2,
    "drawn": 4,
}
LEARNING_RATE = 3e-3
TUNING_RATE = 1e-3  # learning rate of projections, and of all parts trained together
# of 24 blocks; with the paper's share, 10, Qwen's teacher draws one character in twelve wrong
REMOVE = {"qwen": 6, "flux": 8}
SHARE = {"qwen": 0.5, "flux": 0.6}  # parameters of the smallest variant, relative to the teacher's


def demo(config: DemoConfig) -> Path:
    """Runs every stage in the method's order; run again, it goes on from the files in the folder.
    Returns the report. Raises ValueError while another process works in the folder."""
    run = config.run or FOLDERS[config.teacher]
    check_folder(run)
    with holding(run, "demo"):
        if config.teacher == "qwen":
            sheet = first_pictures(config, run, 2 if config.quick else STEPS)
            print(f"what the bundle of this package draws, all sizes: {sheet}", flush=True)
            show_in_browser(sheet)
        report = _whole_method(config, run)
        show_in_browser(report)
        return report


def _whole_method(config: DemoConfig, run: Path) -> Path:
    start = time.monotonic()
    size = QUICK if config.quick else FULL_SIZE
    common = {
        "model": bundled(config.teacher),
        "run": run,
        "device": config.device,
        "seed": config.seed,
    }
    images = render_pictures(run / "images", size["pictures"], config.seed)
    calibrate(
        CalibrateConfig(**common, images=images, samples=size["pictures"], batch=size["batch"])
    )
    probe(ProbeConfig(**common))
    detect(
        DetectConfig(
            **common,
            longest=size["longest"],
            bootstrap=size["bootstrap"],
            remove=REMOVE[config.teacher],
            explain=True,
        )
    )
    depth = {
        "rounds": size["rounds"],
        "updates": size["depth_updates"],
        "learning_rate": LEARNING_RATE,
    }
    distill_depth(DistillDepthConfig(**common, **depth))
    sites = {
        "share": SHARE[config.teacher],
        "longest": min(size["longest"], 6),
        "samples": size["weighed"],
    }
    detect_width(DetectWidthConfig(**common, **sites))
    distill_width(
        DistillWidthConfig(
            **common, rounds=1, updates=size["width_updates"], learning_rate=TUNING_RATE
        )
    )
    polish(PolishConfig(**common, steps=size["steps"], learning_rate=TUNING_RATE))
    variants(VariantsConfig(**common))
    export(ExportConfig(**common))
    export(ExportConfig(**common, layout="ppcl", variant="small", name="small"))
    _stock(common, {**depth, "rounds": size["stock_rounds"]})
    judged = EvaluateConfig(**common, captions=config.captions, steps=size["drawn"])
    return evaluate_with(judged, lambda: time.monotonic() - start)


def _stock(common: dict, depth: dict) -> None:
    """Makes students without corrections, and files of them for hosts without this project's nodes.
    No figure of the report is theirs, so that fewer updates are enough.

    depth: how students are trained.
    """
    run = common["run"] / "stock"
    run.mkdir(parents=True, exist_ok=True)
    for name in ("calibration.safetensors", "plan.json"):
        shutil.copyfile(common["run"] / name, run / name)
    plan = Run(run).load_plan()
    write_text(Run(run).plan, plan.with_parts(sites=(), variants=()).to_json())
    stock = {**common, "run": run}
    distill_depth(DistillDepthConfig(**stock, **depth, correction="none"))
    variants(VariantsConfig(**stock))
    for layout in ("comfyui", "diffusers"):
        export(ExportConfig(**stock, layout=layout, variant="small", name=f"small-{layout}"))
