"""The paper's first finding, measured: does removing neighbouring blocks cost less than blocks
apart?

Removed blocks are skipped, nothing is trained. Error: squared difference of the velocity to the
teacher's, relative to the teacher's squared, over a fixed batch whose timesteps cover the schedule.
contiguous: one run of blocks. apart: no two neighbours. Sets in between (3-4+9) are left out.
Ends of the stack cost more and fall differently into both kinds, so every mean stands beside the
sum of its blocks' single errors (`of_singles` = mean error / mean of those sums).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import torch

from ppcl_engine.algorithms.resampling import bootstrap_ratio
from ppcl_engine.architectures import BlockState
from ppcl_engine.models.streaming import Teacher
from ppcl_engine.models.weights import Weights
from ppcl_engine.system.atomic import replacing

from .shared import output
from .shared.teachers import BUNDLED, describe, rendered

CONTIGUOUS, APART = "contiguous", "apart"
SIZES = (1, 2, 3)
RESAMPLES = 2000
SEED = 0

Placement = tuple[int, ...]
"""Removed blocks, ascending."""


def placements(blocks: int, size: int, kind: str) -> list[Placement]:
    if kind == CONTIGUOUS:
        return [tuple(range(first, first + size)) for first in range(blocks - size + 1)]
    apart = combinations(range(blocks), size)
    return [
        chosen
        for chosen in apart
        if all(b - a > 1 for a, b in zip(chosen, chosen[1:], strict=False))
    ]


def sampled(rows: list[Placement], most: int) -> list[Placement]:
    return rows if len(rows) <= most else sorted(random.Random(SEED).sample(rows, most))


def name_of(placement: Placement) -> str:
    """ "3-5" for a run of neighbours, "3+7+9" for others."""
    run = len(placement) > 1 and placement[-1] - placement[0] == len(placement) - 1
    return f"{placement[0]}-{placement[-1]}" if run else "+".join(map(str, placement))


class Removal:
    """Squared velocity errors of single samples with blocks skipped.

    The states after a set of removed blocks start from the states of the set without its last
    block, so placements in ascending order repeat no block that they share.
    """

    def __init__(self, teacher: Teacher, embedded: BlockState):
        self.teacher, self.embedded = teacher, embedded
        self.blocks = teacher.num_blocks
        self.states = lru_cache(maxsize=8)(self._states)
        self.target = self._velocity(())
        self.power = self.target.square().flatten(1).sum(1)

    def squared(self, placement: Placement) -> torch.Tensor:
        """[samples]"""
        return (self._velocity(placement) - self.target).square().flatten(1).sum(1)

    def _velocity(self, placement: Placement) -> torch.Tensor:
        return self.teacher.architecture.finish(
            self.teacher.outer, self.states(placement)[self.blocks]
        ).double()

    def _states(self, placement: Placement) -> dict[int, BlockState]:
        """The input of every block behind the last removed one; key `blocks` is the end."""
        first = placement[-1] + 1 if placement else 0
        states = {first: self.states(placement[:-1])[placement[-1]] if placement else self.embedded}
        for index, block in self.teacher.blocks(range(first, self.blocks)):
            states[index + 1] = self.teacher.architecture.run_block(block, states[index])
        return states


@dataclass(frozen=True)
class Measured:
    """squared: placement -> [samples]; power: the teacher's own, [samples]."""

    squared: dict[Placement, torch.Tensor]
    power: torch.Tensor

    def error(self, squared: torch.Tensor) -> dict:
        low, high = bootstrap_ratio(squared, self.power, SEED, RESAMPLES)
        return {"error": float(squared.sum() / self.power.sum()), "low": low, "high": high}

    def placement(self, placement: Placement) -> dict:
        return {"blocks": name_of(placement), **self.error(self.squared[placement])}

    def mean(self, rows: Iterable[Placement]) -> torch.Tensor:
        return torch.stack([self.squared[row] for row in rows]).mean(0)

    def singles(self, rows: Iterable[Placement]) -> torch.Tensor:
        """Mean over placements of the sum of their blocks' single errors, [samples]."""
        return torch.stack([sum(self.squared[block,] for block in row) for row in rows]).mean(0)

    def group(self, size: int, kind: str, rows: list[Placement], possible: int) -> dict:
        mean, singles = self.mean(rows), self.singles(rows)
        low, high = bootstrap_ratio(mean, singles, SEED, RESAMPLES)
        of_singles = {
            "of_singles": float(mean.sum() / singles.sum()),
            "of_singles_low": low,
            "of_singles_high": high,
        }
        counts = {"removed": size, "kind": kind, "placements": len(rows), "possible": possible}
        return {**counts, **self.error(mean), **of_singles}

    def difference(self, size: int, contiguous: list[Placement], apart: list[Placement]) -> dict:
        """Mean of contiguous minus mean of apart; the interval is paired, sample by sample."""
        values = self.error(self.mean(contiguous) - self.mean(apart))
        return {
            "removed": size,
            "contiguous_minus_apart": values["error"],
            "low": values["low"],
            "high": values["high"],
        }


def measure(removal: Removal, groups: dict[tuple[int, str], list[Placement]]) -> Measured:
    wanted = sorted({placement for rows in groups.values() for placement in rows})
    with torch.no_grad():
        return Measured(
            {placement: removal.squared(placement) for placement in wanted}, removal.power
        )


def summary(
    measured: Measured, groups: dict[tuple[int, str], list[Placement]], blocks: int
) -> dict:
    possible = {key: len(placements(blocks, *key)) for key in groups}
    pairs = [(n, groups[n, CONTIGUOUS], groups[n, APART]) for n in SIZES if (n, APART) in groups]
    return {
        "single": [measured.placement(row) for row in groups[1, CONTIGUOUS]],
        "means": [measured.group(*key, rows, possible[key]) for key, rows in groups.items()],
        "differences": [measured.difference(*pair) for pair in pairs],
        "placements": {
            f"{n} {kind}": [measured.placement(r) for r in rows]
            for (n, kind), rows in groups.items()
            if n > 1
        },
    }


def show(values: dict) -> None:
    interval = "{low:.4f} .. {high:.4f}".format_map
    singles = [[row["blocks"], f"{row['error']:.4f}", interval(row)] for row in values["single"]]
    output.print_table(
        "one block removed: relative velocity error", ["block", "error", "95 % interval"], singles
    )
    rows = []
    for m in values["means"]:
        counts = [f"{m['removed']} {m['kind']}", f"{m['placements']} of {m['possible']}"]
        rows.append([*counts, f"{m['error']:.4f}", interval(m), f"{m['of_singles']:.2f}"])
    header = ["removed", "placements", "mean error", "95 % interval", "x sum of singles"]
    output.print_table("neighbours against blocks apart", header, rows)
    rows = [
        [str(d["removed"]), f"{d['contiguous_minus_apart']:+.4f}", interval(d)]
        for d in values["differences"]
    ]
    header = ["removed", "difference", "95 % interval"]
    output.print_table("contiguous minus apart (below 0: contiguous is better)", header, rows)


def draw(path: Path, values: dict) -> None:
    """Left: every single block. Right: means of both kinds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    single = values["single"]
    left.bar(
        range(len(single)),
        [r["error"] for r in single],
        yerr=_whiskers(single),
        color="#4c72b0",
        capsize=2,
    )
    left.set_xticks(range(len(single)), [r["blocks"] for r in single], fontsize=8)
    left.set(title="one block skipped", xlabel="block", ylabel="relative velocity error, squared")
    for offset, kind, colour in ((-0.2, CONTIGUOUS, "#4c72b0"), (0.2, APART, "#dd8452")):
        means = [m for m in values["means"] if m["kind"] == kind]
        where = [m["removed"] + (offset if m["removed"] > 1 else 0) for m in means]
        right.bar(
            where,
            [m["error"] for m in means],
            0.38,
            yerr=_whiskers(means),
            color=colour,
            capsize=3,
            label=kind,
        )
    right.set_xticks(SIZES)
    right.set(title="mean over placements, 95 % intervals", xlabel="blocks skipped")
    right.legend(frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(bottom=0)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})


def _whiskers(rows: list[dict]) -> list[list[float]]:
    return [
        [max(0.0, r["error"] - r["low"]) for r in rows],
        [max(0.0, r["high"] - r["error"]) for r in rows],
    ]


def main(arguments: list[str] | None = None) -> Path:
    parser = output.options("removal", __doc__)
    parser.add_argument("--teacher", type=Path, default=BUNDLED)
    parser.add_argument(
        "--samples", type=int, help="pictures in the batch, each at its own timestep (64)"
    )
    parser.add_argument(
        "--most", type=int, help="placements of 3 blocks apart that are drawn at random (300)"
    )
    chosen = output.parse(parser, arguments)
    samples = chosen.samples or (8 if chosen.quick else 64)
    most = chosen.most or (5 if chosen.quick else 300)
    start, weights = time.perf_counter(), Weights(chosen.teacher)
    calibration = rendered(chosen.teacher, weights, samples, samples, seed=SEED)
    teacher = Teacher(weights, torch.float32, "cpu", streamed=False)
    kinds = [(1, CONTIGUOUS), *((n, kind) for n in SIZES[1:] for kind in (CONTIGUOUS, APART))]
    groups = {(n, kind): placements(teacher.num_blocks, n, kind) for n, kind in kinds}
    groups = {key: sampled(rows, most) if key[1] == APART else rows for key, rows in groups.items()}
    with torch.no_grad():
        removal = Removal(teacher, teacher.embed(calibration.inputs(0)))
    values = summary(measure(removal, groups), groups, teacher.num_blocks)
    values |= {
        "teacher": describe(chosen.teacher, weights),
        "samples": samples,
        "seconds": time.perf_counter() - start,
    }
    show(values)
    draw(chosen.output / "removal.png", values)
    return output.write("removal", chosen, values)


if __name__ == "__main__":
    main()
