"""How long a stage takes its time: three sets of the settings that count its work.

"paper" is what the paper does, where it says so: 50 gradient steps on a probe, 6,000 updates of a
student, 2,000 of a projection, 1,000 steps on all of them together; samples are those of this
project's recipe for Qwen-Image. "good" does a sixth of the updates; "quick" shows what the result
will look like, roughly. Learning rates belong to the model and not to a preset.
"""

from __future__ import annotations

from typing import Literal, get_args

Quality = Literal["quick", "good", "paper"]
QUALITIES: tuple[str, ...] = get_args(Quality)

PRESETS: dict[str, dict[str, dict]] = {
    "calibrate": {
        "quick": {"samples": 24, "steps": 10},
        "good": {"samples": 48, "steps": 20},
        "paper": {"samples": 64, "steps": 20},
    },
    "probe": {
        "quick": {"train_steps": 0},
        "good": {"train_steps": 20},
        "paper": {"train_steps": 50},
    },
    "detect": {
        "quick": {"samples": 8, "longest": 4, "bootstrap": 20},
        "good": {"samples": 16, "longest": 6, "bootstrap": 100},
        "paper": {"samples": 32, "longest": 8, "bootstrap": 200},
    },
    # few rounds of many updates: at full size the teacher is read less often, and the updates are the same
    "distill-depth": {
        "quick": {"rounds": 2, "updates": 40},
        "good": {"rounds": 10, "updates": 100},
        "paper": {"rounds": 15, "updates": 400},
    },
    "detect-width": {
        "quick": {"samples": 8, "longest": 3},
        "good": {"samples": 16, "longest": 5},
        "paper": {"samples": 32, "longest": 8},
    },
    "distill-width": {
        "quick": {"rounds": 1, "updates": 20},
        "good": {"rounds": 4, "updates": 80},
        "paper": {"rounds": 5, "updates": 400},
    },
    "polish": {
        "quick": {"steps": 30},
        "good": {"steps": 170},
        "paper": {"steps": 1000},
    },
    "variants": {
        "quick": {"samples": 8},
        "good": {"samples": 16},
        "paper": {"samples": 32},
    },
    "finetune": {
        "quick": {"steps": 50},
        "good": {"steps": 300},
        "paper": {"steps": 1000},
    },
    "evaluate": {
        "quick": {"captions": 4, "steps": 12},
        "good": {"captions": 12, "steps": 20},
        "paper": {"captions": 48, "steps": 20},
    },
}
"""stage -> quality -> settings"""


def preset(stage: str, quality: str) -> dict:
    """Settings of the stage. Raises ValueError for a quality that is not known."""
    if quality not in QUALITIES:
        raise ValueError(f"quality {quality[:50]!r}: choose from {', '.join(QUALITIES)}")
    return dict(PRESETS[stage][quality])
