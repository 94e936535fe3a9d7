"""A run file at a size that any machine runs: the bundled teacher for the real model, few samples
and steps.

Everything that shapes the run stays as the file says: which stages, methods, losses, forms,
variants. What counts blocks, pixels or bytes of the real model is left out or shrunk.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from ..models.weights import Weights
from .bundled import TEACHERS, bundled, render_pictures

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
PLAIN = {
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


def tiny_run(name: str, table: dict, stages: list[tuple[str, object]]) -> list[tuple[str, object]]:
    """The stages of a run file on a small teacher, in runs/<name>_tiny. table: its [tiny]:
    `teacher`, and `blocks`, how many the real model has. Raises ValueError where it names no
    teacher."""
    teacher, blocks = table.get("teacher"), table.get("blocks")
    if not (
        isinstance(teacher, str) and teacher in TEACHERS and type(blocks) is int and blocks > 0
    ):
        names = ", ".join(f"'{name}'" for name in TEACHERS)
        raise ValueError(
            f"--tiny needs [tiny] in the run file with teacher = one of {names}, and blocks = how many"
        )
    run, model = Path("runs") / f"{name}_tiny", bundled(teacher)
    share = Weights(model).num_blocks / blocks
    return [(stage, _tiny(config, run, model, share)) for stage, config in stages]


def _tiny(config, run: Path, model: Path, share: float):
    """`share`: the small model's blocks for one of the real model's."""
    known = {field.name for field in fields(config)}
    changes = {"run": run, "model": model, **PLAIN}
    changes |= {
        name: min(getattr(config, name), most) for name, most in MOST.items() if name in known
    }
    if remove := getattr(config, "remove", 0):
        changes["remove"] = max(1, round(remove * share))
    if "images" in known:
        changes["images"] = render_pictures(run / "images", PICTURES, seed=0)
    changes |= {source: None for source in ("prompts", "embeddings")}
    return replace(config, **{name: value for name, value in changes.items() if name in known})
