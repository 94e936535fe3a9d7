"""A run file at a size that any machine can run: a bundled teacher instead of the real model, and few
samples and steps.

Stages, methods, losses, forms and variants stay as the file says. Settings that count blocks, pixels or
bytes of the real model are reset or reduced.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from ..models.weights import Weights
from ..settings.ranges import Settings
from .bundled import TEACHERS, bundled, render_pictures

# largest values of settings that count work
MOST = {
    "samples": 16,
    "batch": 8,
    "train_steps": 2,
    "bootstrap": 5,
    "longest": 3,
    "rounds": 1,
    "updates": 2,
    "warm_up": 1,
    "steps": 2,
    "save_every": 2,
    "captions": 4,
    "cache_gb": 1.0,
}
# settings that are replaced
REPLACED = {
    "dtype": "float32",
    "streamed": False,
    "device": "auto",
    "dry_run": False,
    "protect": "",
    "intervals": "",
    "sites": "",
    "height": 0,
    "width": 0,
    "most_parameters": 0.0,
    "most_megabytes": 0.0,
    "most_milliseconds": 0.0,
}
PICTURES = 16


def tiny_run(
    name: str, table: dict, stages: list[tuple[str, Settings]]
) -> list[tuple[str, Settings]]:
    """The stages of a run file on a small teacher, in runs/<name>_tiny.

    table: the file's [tiny], with the name of a `teacher`, and in `blocks` how many blocks the real
    model has. Raises ValueError if one of them is missing or wrong.
    """
    teacher, blocks = table.get("teacher"), table.get("blocks")
    if not (
        isinstance(teacher, str) and teacher in TEACHERS and type(blocks) is int and blocks > 0
    ):
        names = ", ".join(f"'{name}'" for name in TEACHERS)
        raise ValueError(
            f"--tiny needs [tiny] in the run file, with teacher = one of {names} and blocks = how many the "
            "real model has"
        )
    run, model = Path("runs") / f"{name}_tiny", bundled(teacher)
    share = Weights(model).num_blocks / blocks
    return [(stage, _tiny(config, run, model, share)) for stage, config in stages]


def _tiny(config: Settings, run: Path, model: Path, share: float) -> Settings:
    """share: blocks of the small model for each block of the real one."""
    known = {field.name for field in fields(config)}
    changes = {"run": run, "model": model, **REPLACED}
    changes |= {
        name: min(getattr(config, name), most) for name, most in MOST.items() if name in known
    }
    if remove := getattr(config, "remove", 0):
        changes["remove"] = max(1, round(remove * share))
    if "images" in known:
        changes["images"] = render_pictures(run / "images", PICTURES, seed=0)
    changes |= {source: None for source in ("prompts", "embeddings")}
    return replace(config, **{name: value for name, value in changes.items() if name in known})
