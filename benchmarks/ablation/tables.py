"""The tables of the ablation: which rows there are, and how each is built."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ppcl_engine.models.weights import expected_shapes

from .rows import (
    PAPER,
    Build,
    Context,
    Recipe,
    baseline_row,
    intervals,
    recipe_row,
    sequential_row,
)

PAPER_REMOVED = 25 / 60  # of the blocks
OURS_REMOVED = 1 / 4  # of the blocks, where half of the parameters go; width takes the rest
# of the budget: students and projections alone, which switch
PARTS = {"depth": 0.35, "width": 0.1, "polish": 0.55}
TUNED = {"depth": 0.25, "width": 0.05, "polish": 0.3, "finetune": 0.4}
SIZES = {"large": 0.684, "medium": 0.584, "small": 0.519}  # 13.97, 11.93 and 10.60 of 20.43 B
TABLES = ("ladder", "equal_parameters", "sizes")
HALF = -1.0  # stands for `half` of the teacher at hand
OTHERS = ("tinyfusion", "hierarchical_prune", "cosine", "mse", "every_second", "random_contiguous")


@dataclass(frozen=True)
class Row:
    table: str
    name: str
    build: Callable[[Context], Build]

    @property
    def folder(self) -> str:
        return f"{self.table}-{self.name}".replace(" ", "_").replace("+", "with").replace(",", "")

    @property
    def readings(self) -> str:
        """The file with what was read of each picture."""
        return f"{self.folder}/readings.safetensors"


def rows() -> list[Row]:
    """In the order in which they run; what a row needs of the context is looked up when its turn
    comes."""
    ladder, equal = "ladder", "equal_parameters"

    def paper(width: dict | None, shares: dict[str, float]) -> Callable[[Context], Build]:
        def build(c: Context) -> Build:
            chosen = width and {
                **width,
                "share": half(c) if width["share"] == HALF else width["share"],
            }
            return recipe_row(Recipe(intervals=greedy(c), depth=PAPER, width=chosen, shares=shares))

        return build

    text = {"method": "cka", "form": "paper", "kinds": "text", "share": 0.56}
    both = {"method": "cka", "form": "paper", "share": 0.519}
    at_half = {"method": "cka", "form": "paper", "share": HALF}
    return [
        Row(equal, "ours", lambda c: recipe_row(ours(c, half(c), TUNED))),
        Row(equal, "ours, parts only", lambda c: recipe_row(ours(c, half(c), PARTS))),
        Row(equal, "ppcl", paper(at_half, {"depth": 0.5, "width": 0.25, "finetune": 0.25})),
        *(
            Row(equal, name, lambda c, name=name: baseline_row(name, c.teacher.num_blocks // 2))
            for name in OTHERS
        ),
        Row(
            ladder,
            "cka_sequential",
            lambda c: baseline_row("cka_sequential", removed(c, PAPER_REMOVED)),
        ),
        Row(ladder, "+ linear probes", lambda c: sequential_row(greedy(c))),
        Row(ladder, "+ non-sequential", paper(None, {"depth": 1.0})),
        Row(ladder, "+ text", paper(text, {"depth": 0.75, "width": 0.25})),
        Row(ladder, "+ FFN", paper(both, {"depth": 0.65, "width": 0.35})),
        Row(ladder, "+ fine-tune", paper(both, {"depth": 0.45, "width": 0.25, "finetune": 0.3})),
        Row("sizes", "separate large", lambda c: recipe_row(ours(c, SIZES["large"], PARTS))),
        Row("sizes", "separate medium", lambda c: recipe_row(ours(c, SIZES["medium"], PARTS))),
        Row("sizes", "one training small", lambda c: recipe_row(ours(c, SIZES["small"], PARTS))),
    ]


def removed(context: Context, share: float) -> int:
    return max(1, round(context.teacher.num_blocks * share))


def greedy(context: Context) -> str:
    return intervals(context, "ppcl", removed(context, PAPER_REMOVED))


def half(context: Context) -> float:
    """Share of the parameters that a model without half of its blocks, of each kind, has: what the
    baselines get."""
    shapes = expected_shapes(context.teacher.architecture, context.teacher.config)
    count = {name: math.prod(shape) for name, shape in shapes.items()}
    prefix = partial(context.teacher.architecture.block_prefix, context.teacher.config)
    blocks = tuple(map(prefix, range(context.teacher.num_blocks)))
    return 1 - sum(size for name, size in count.items() if name.startswith(blocks)) / 2 / sum(
        count.values()
    )


def ours(context: Context, share: float, shares: dict[str, float]) -> Recipe:
    """Intervals by measured damage, affine starts, width in the cheapest forms, polish, and a
    fine-tune where it is asked for."""
    count = removed(context, OURS_REMOVED * 2 * (1 - share))
    width = {"method": "damage", "form": "best", "share": share, "samples": 48}
    return Recipe(
        intervals=intervals(context, "budget", count), width=width, shares=shares, finetune_rate=0.3
    )
