"""Which setting to change when memory does not suffice, stage by stage."""

from __future__ import annotations

from . import config, config_files

STREAMED = ("streamed", False, "turn on streamed (blocks are read from disk one after the other)")
CHECKPOINTING = ("checkpointing", False, "turn on checkpointing (blocks are computed again for their gradients)")
CACHE = ("cache_gb", None, "lower cache_gb")
BATCH = "calibrate again with a smaller batch, or smaller pictures"
ADVICE = {
    config.CalibrateConfig: ([("batch", None, "lower batch"), STREAMED], "make the pictures smaller (height, width)"),
    config.ProbeConfig: ([STREAMED], "calibrate again with fewer samples"),
    config.DetectConfig: ([STREAMED], "lower samples"),
    config.DistillDepthConfig: ([STREAMED, CACHE], BATCH),
    config.DetectWidthConfig: ([STREAMED, CACHE], BATCH),
    config.DistillWidthConfig: ([STREAMED, CACHE], BATCH),
    config.PolishConfig: ([CHECKPOINTING, STREAMED], BATCH),
    config.VariantsConfig: ([STREAMED], "lower samples"),
    config.FinetuneConfig: ([CHECKPOINTING, STREAMED], f"choose a smaller variant, or {BATCH}"),
    config_files.ExportConfig: ([], "close other programs"),
    config_files.SparsifyConfig: (
        [("streamed", False, "turn on streamed (states between blocks wait on disk)")],
        "calibrate again with fewer samples",
    ),
    config_files.EvaluateConfig: (
        [STREAMED, ("batch", None, "lower batch")],
        "make the pictures smaller (height, width)",
    ),
}
"""Settings to change in this order: (name, the value with which it still helps; None: any, advice), then what is left."""


def memory_advice(settings: config.Common) -> str:
    """The first settings that still help, two at most."""
    first, rest = ADVICE[type(settings)]
    helping = [text for name, value, text in first if value is None or getattr(settings, name) == value]
    return " or ".join([*helping, rest][:2])


def setting_advice(settings: config.Common, setting: str) -> str:
    """How to change this one; "" where the stage has no advice of its own."""
    return next((text for name, _, text in ADVICE[type(settings)][0] if name == setting), "")


def last_advice(settings: config.Common) -> str:
    """What is left when no single setting helps."""
    return ADVICE[type(settings)][1]
