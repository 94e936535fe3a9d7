"""Which setting to change if a stage needs more memory than there is."""

from __future__ import annotations

from ..settings import assess_settings, convert_settings, prune_settings
from ..settings.ranges import Settings

STREAMED = ("streamed", False, "turn on streamed (blocks are read from disk one after the other)")
CHECKPOINTING = (
    "checkpointing",
    False,
    "turn on checkpointing (blocks are computed again for their gradients)",
)
CACHE = ("cache_gb", None, "lower cache_gb")
BATCH = "calibrate again with a smaller batch, or smaller pictures"
ADVICE = {
    prune_settings.CalibrateConfig: (
        [("batch", None, "lower batch"), STREAMED],
        "make the pictures smaller (height, width)",
    ),
    prune_settings.ProbeConfig: ([STREAMED], "calibrate again with fewer samples"),
    prune_settings.DetectConfig: ([STREAMED], "lower samples"),
    prune_settings.DistillDepthConfig: ([STREAMED, CACHE], BATCH),
    prune_settings.DetectWidthConfig: ([STREAMED, CACHE], BATCH),
    prune_settings.DistillWidthConfig: ([STREAMED, CACHE], BATCH),
    prune_settings.PolishConfig: ([CHECKPOINTING, STREAMED], BATCH),
    prune_settings.VariantsConfig: ([STREAMED], "lower samples"),
    prune_settings.FinetuneConfig: (
        [CHECKPOINTING, STREAMED],
        f"choose a smaller variant, or {BATCH}",
    ),
    convert_settings.ExportConfig: ([], "close other programs"),
    convert_settings.AdaptLoraConfig: ([STREAMED], "calibrate again with fewer samples"),
    convert_settings.SparsifyConfig: (
        [("streamed", False, "turn on streamed (states between blocks wait on disk)")],
        "calibrate again with fewer samples",
    ),
    assess_settings.EvaluateConfig: (
        [STREAMED, ("batch", None, "lower batch")],
        "make the pictures smaller (height, width)",
    ),
}
"""stage's settings -> (what to change, in this order, and what is left if none of it helps). Each change
is (setting, the value with which it still helps (None: any), advice)."""


def memory_advice(settings: Settings) -> str:
    """The first settings that still help, two at most."""
    changes, rest = ADVICE[type(settings)]
    helping = [
        text for name, value, text in changes if value is None or getattr(settings, name) == value
    ]
    return " or ".join([*helping, rest][:2])


def setting_advice(settings: Settings, setting: str) -> str:
    """How to change this one; "" where the stage has no advice of its own."""
    return next((text for name, _, text in ADVICE[type(settings)][0] if name == setting), "")


def last_advice(settings: Settings) -> str:
    """What is left when no single setting helps."""
    return ADVICE[type(settings)][1]
