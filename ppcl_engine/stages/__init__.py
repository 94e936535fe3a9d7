"""The stages in the order of the method, and how one is run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from ..settings import assess_settings, convert_settings, prune_settings
from ..system.early import begin
from ..system.outputs import check_folder

STAGES: dict[str, tuple[type, str]] = {
    "data": (prune_settings.DataConfig, "prune.make_data"),
    "calibrate": (prune_settings.CalibrateConfig, "prune.calibrate"),
    "probe": (prune_settings.ProbeConfig, "prune.probe"),
    "detect": (prune_settings.DetectConfig, "prune.detect"),
    "distill-depth": (prune_settings.DistillDepthConfig, "prune.distill_depth"),
    "detect-width": (prune_settings.DetectWidthConfig, "prune.detect_width"),
    "distill-width": (prune_settings.DistillWidthConfig, "prune.distill_width"),
    "polish": (prune_settings.PolishConfig, "prune.polish"),
    "variants": (prune_settings.VariantsConfig, "prune.variants"),
    "finetune": (prune_settings.FinetuneConfig, "prune.finetune"),
    "export": (convert_settings.ExportConfig, "convert.export"),
    "adapt-lora": (convert_settings.AdaptLoraConfig, "convert.adapt_lora"),
    "fold": (convert_settings.FoldConfig, "convert.fold"),
    "sparsify": (convert_settings.SparsifyConfig, "convert.sparsify"),
    "merge": (convert_settings.MergeConfig, "convert.merge"),
    "import": (convert_settings.ImportConfig, "convert.import_released"),
    "evaluate": (assess_settings.EvaluateConfig, "assess.evaluate"),
    "generate": (assess_settings.GenerateConfig, "assess.generate"),
    "inspect": (assess_settings.InspectConfig, "assess.inspect"),
    "bench": (assess_settings.BenchConfig, "assess.bench"),
    "demo": (assess_settings.DemoConfig, ".demo.run"),
}
"""name -> (settings, module in this package)"""
ROOMS = {
    "prune": "the method, in its order",
    "convert": "one model file from another",
    "assess": "look at models",
    "run": "several stages with one command",
}
"""folder of the stages, or what runs several -> what they are for"""
FUNCTIONS = {"import": "import_released", "data": "make_data"}
"""the stage's function, where it has another name: the stage's is a keyword of Python, or no verb"""


def room_of(stage: str) -> str:
    """Where ROOMS has this stage: by its folder; "run" for what stands above the stages."""
    return STAGES[stage][1].partition(".")[0] or "run" if stage in STAGES else "run"


def run_stage(stage: str, config) -> object:
    """Runs a stage in this process, or in all processes of a launch together. Returns what the stage
    made; None from a dry run, and from all processes but the main one."""
    from ..system.distributed import together

    if getattr(config, "run", None) is not None:
        check_folder(config.run)
    if getattr(config, "dry_run", False):
        from ..estimate.dry_run import print_estimate

        begin()
        together(print_estimate, config)
        return None
    work = function_of(stage)
    begin()
    with _working_in(getattr(config, "run", None), stage):
        result = together(work, config, getattr(config, "parallel", ""))
    if result is not None:
        print(f"{stage}: {result}")
    return result


def _working_in(folder: Path | None, stage: str) -> AbstractContextManager:
    """Holds the lock of the stage's run folder; of several processes, the main one holds it for all."""
    from ..system.distributed import is_main
    from ..system.run_lock import holding

    return holding(folder, stage) if folder is not None and is_main() else nullcontext()


def function_of(stage: str) -> Callable:
    """The stage's function has the stage's name; its module is imported only now."""
    module = importlib.import_module(f".{STAGES[stage][1]}", __package__)
    return getattr(module, FUNCTIONS.get(stage, stage.replace("-", "_")))
