"""Which places of a variant a LoRA has to be fitted to, and on which of their linear maps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ...architectures import Architecture
from ...architectures.linear_maps import LINEAR_MAPS, linear_maps
from ...architectures.modules import AnyModule
from ...models.layout import Layout, Place
from ...models.lora import gone_parts
from ...models.lora_files import LoraFile, Module
from ...models.surgery import projection_modules

USUAL_RANK = 16  # of a LoRA that has no low-rank pairs


@dataclass(frozen=True)
class Work:
    """A place whose student or projections take over what the LoRA says of what they replace."""

    place: Place
    changed: tuple[str, ...]
    """the linear maps of the replaced blocks that the LoRA changes, by their names in a block"""
    projections: tuple[str, ...]
    """kinds of the projections that replaced some of these"""

    @property
    def name(self) -> str:
        return self.place.name


class Names:
    """The tensors that a LoRA changes, by block."""

    def __init__(self, architecture: Architecture, config: dict, lora: LoraFile):
        self.architecture, self.lora = architecture, lora
        self.prefixes = [
            architecture.block_prefix(config, index)
            for index in range(architecture.num_blocks(config))
        ]
        self.by_block: list[tuple[str, ...]] = [
            tuple(key.removeprefix(prefix) for key in lora.targets if key.startswith(prefix))
            for prefix in self.prefixes
        ]

    def work(self, layout: Layout) -> list[Work]:
        """The places to be fitted, in order."""
        return [work for place in layout.places if (work := self._work_at(place)) is not None]

    def _work_at(self, place: Place) -> Work | None:
        if place.interval is None and not place.ffn:
            return None
        blocks = place.interval.blocks if place.interval else range(place.index, place.index + 1)
        names = dict.fromkeys(name for index in blocks for name in self.by_block[index])
        maps = tuple(n.removesuffix(".weight") for n in names if n.endswith(".weight"))
        replaced = {site.kind: self.architecture.replaced_names[site.kind] for site in place.ffn}
        projections = tuple(
            kind
            for kind, prefixes in replaced.items()
            if any(f"{name}.".startswith(prefixes) for name in maps)
        )
        gone = gone_parts(self.architecture, place)
        left = tuple(name for name in maps if not f"{name}.".startswith(gone))
        if not projections and (place.interval is None or not left):
            return None
        return Work(place, left, projections)

    def rank(self, work: Work) -> int:
        """The largest rank of what the LoRA says of the replaced blocks."""
        keys = [self.prefixes[i] + name for i in self.blocks(work) for name in self.by_block[i]]
        pairs = [self.lora.low_rank(key) or [] for key in keys]
        return max((len(pair.down) for found in pairs for pair in found), default=USUAL_RANK)

    def blocks(self, work: Work) -> range:
        interval = work.place.interval
        return interval.blocks if interval else range(work.place.index, work.place.index + 1)

    def dropped(self, layout: Layout, works: list[Work]) -> Iterator[Module]:
        """The modules of the LoRA that the adapted file has no place for, or new pairs in place of."""
        fitted = {work.place.index for work in works}
        places = {place.index: place for place in layout.places}
        for module in self.lora.modules:
            if not any(self._kept(key, places, fitted) for key in module.target.parts):
                yield module

    def _kept(self, key: str, places: dict[int, Place], fitted: set[int]) -> bool:
        index = next((i for i, p in enumerate(self.prefixes) if key.startswith(p)), None)
        if index is None:
            return True
        place = places.get(index)
        if place is None or (place.interval is not None and index in fitted):
            return False
        name = key.removeprefix(self.prefixes[index])
        return not name.startswith(gone_parts(self.architecture, place))


def fitted_maps(
    architecture: Architecture, block: AnyModule, whole: dict[str, tuple[int, ...]], work: Work
) -> tuple[str, ...]:
    """The maps of a place's block that get a pair. A map that was cut gets none.

    whole: shapes of the full model's block.
    """
    maps: dict[str, nn.Linear] = linear_maps(block)
    names = []
    if work.place.interval is not None:
        wanted = (*work.changed, *last_maps(architecture, block, work).values())
        names = [
            name
            for name in maps
            if name in wanted and tuple(maps[name].weight.shape) == whole.get(f"{name}.weight")
        ]
    projected = [
        architecture.projection_names[kind]["map"]
        for kind in work.projections
        if "map" in projection_modules(architecture, block, kind)
    ]
    return tuple(dict.fromkeys((*names, *projected)))


def last_maps(architecture: Architecture, block: AnyModule, work: Work) -> dict[str, str]:
    """Stream -> the map whose output reaches it through nothing but a gate: a projection, or of a
    student the last map of its FFN."""
    found = {}
    if work.place.interval is not None:
        there = linear_maps(block)
        found = {s: m for s, m in LINEAR_MAPS[architecture.name].last if m in there}
    projected = {
        kind.removeprefix("ffn_"): architecture.projection_names[kind]["map"]
        for kind in work.projections
    }
    return {**found, **projected}
