"""How much of a LoRA is where: the energy of its changes by block, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...architectures import Architecture
from ...models.layout import Layout
from ...models.lora import coverage
from ...models.lora_files import LoraFile
from .low_rank import energy

OUTSIDE = -1  # in place of a block's number


@dataclass(frozen=True)
class BlockEnergy:
    """Sums of squared singular values of a LoRA's changes of one block."""

    block: int
    """the teacher's number; OUTSIDE: outside of all blocks"""
    reached: float
    """of what the pruned model still has"""
    removed: float
    """of what was removed with its block"""
    projected: float
    """of what a projection replaced"""

    @property
    def total(self) -> float:
        return self.reached + self.removed + self.projected


def energies(
    lora: LoraFile, architecture: Architecture, config: dict, layout: Layout
) -> tuple[list[BlockEnergy], int]:
    """(every block that the LoRA changes, in order; how many tensors are not counted: changes that
    are computed from the weights themselves, such as DoRA's)."""
    fates = coverage(architecture, config, lora.targets, (), layout)
    fate_of = {name: fate for fate in ("removed", "projected") for name in getattr(fates, fate)}
    prefixes = [architecture.block_prefix(config, i) for i in range(layout.num_blocks)]
    sums: dict[int, dict[str, float]] = {}
    uncounted = 0
    for key in lora.targets:
        if lora.reads_base(key):
            uncounted += 1
            continue
        block = next((i for i, p in enumerate(prefixes) if key.startswith(p)), OUTSIDE)
        found = sums.setdefault(block, {"reached": 0.0, "removed": 0.0, "projected": 0.0})
        found[fate_of.get(key, "reached")] += _energy(lora, key)
    return [BlockEnergy(block, **found) for block, found in sorted(sums.items())], uncounted


def share_text(rows: Sequence[BlockEnergy], uncounted: int) -> str:
    """ "71 % of its energy reaches the model; 24 % belongs to removed blocks, 5 % to projected parts" """
    total = sum(row.total for row in rows)
    if not total:
        return "its changes have no energy"
    reached, removed, projected = (
        100 * sum(getattr(row, name) for row in rows) / total
        for name in ("reached", "removed", "projected")
    )
    text = (
        f"{reached:.0f} % of its energy reaches the model; {removed:.0f} % belongs to removed blocks, "
        f"{projected:.0f} % to projected parts"
    )
    return f"{text} ({uncounted} tensors not counted)" if uncounted else text


def _energy(lora: LoraFile, key: str) -> float:
    pairs = lora.low_rank(key)
    if pairs is not None:
        return energy(pairs)
    change = lora.change(key)
    return 0.0 if change is None else float(change.double().square().sum())
