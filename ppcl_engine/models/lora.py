"""What a pruned model can use of a LoRA: which of its targets exist, were removed, or were
projected."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..architectures import Architecture
from .layout import Layout, Place

LISTED = 12


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """The names of a LoRA's modules, by what becomes of them."""

    reached: tuple[str, ...] = ()
    """they apply"""
    halved: tuple[str, ...] = ()
    """those of the reached of which only a part still exists"""
    removed: tuple[str, ...] = ()
    """their block was removed"""
    projected: tuple[str, ...] = ()
    """their part of the block was projected"""
    unknown: tuple[str, ...] = ()
    """not of this architecture"""

    @property
    def count(self) -> int:
        return len(self.reached) + len(self.removed) + len(self.projected) + len(self.unknown)

    def text(self) -> str:
        """ "covers 15 of 24 modules; 9 belong to removed blocks", then the names."""
        parts = [f"covers {len(self.reached)} of {self.count} modules"]
        parts += [f"{len(names)} {words}" for words, names in self._missed() if names]
        lines = ["; ".join(parts)]
        lines += [f"{words}: {_listed(names)}" for words, names in self._named() if names]
        return "\n".join(lines)

    def line(self) -> str:
        """The same in one line, without the names of those that are reached."""
        first, *names = self.text().splitlines()
        missed = [line for line in names if not line.startswith("reached")]
        return "; ".join([first, *missed])

    def _missed(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return (
            ("belong to removed blocks", self.removed),
            ("belong to projected parts", self.projected),
            ("are not of this model", self.unknown),
        )

    def _named(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        return (
            ("of removed blocks", self.removed),
            ("of projected parts", self.projected),
            ("not of this model", self.unknown),
            ("reached in a first part", self.halved),
            ("reached", self.reached),
        )


def coverage(
    architecture: Architecture,
    config: dict,
    targets: Iterable[str],
    unknown: Iterable[str],
    layout: Layout,
) -> Coverage:
    """How much of a LoRA fits this layout.

    targets: weights of the full model that it changes, by diffusers' names
    (`transformer_blocks.3.attn...`).
    """
    places = {place.index: place for place in layout.places}
    prefixes = {
        architecture.block_prefix(config, index): index for index in range(layout.num_blocks)
    }
    names_by_fate: dict[str, list[str]] = {
        "reached": [],
        "halved": [],
        "removed": [],
        "projected": [],
    }
    for name in sorted(set(targets), key=_natural):
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is None:
            names_by_fate["reached"].append(name)
            continue
        place, part = places.get(prefixes[prefix]), name.removeprefix(prefix)
        if place is None:
            names_by_fate["removed"].append(name)
        elif part.startswith(gone_parts(architecture, place)):
            names_by_fate["projected"].append(name)
        else:
            names_by_fate["reached"].append(name)
            if part.startswith(cut_parts(architecture, place)):
                names_by_fate["halved"].append(name)
    return Coverage(
        unknown=tuple(sorted(set(unknown), key=_natural)),
        **{k: tuple(v) for k, v in names_by_fate.items()},
    )


def gone_parts(architecture: Architecture, place: Place) -> tuple[str, ...]:
    """Prefixes of the names whose weights a place's projections replace."""
    return tuple(name for kind in place.projections for name in architecture.replaced_names[kind])


def cut_parts(architecture: Architecture, place: Place) -> tuple[str, ...]:
    """Prefixes of the names of which only the first rows or columns are left."""
    sites = ((site.kind, site.form) for site in place.ffn)
    return tuple(name for site in sites for name in architecture.cut_names.get(site, ()))


def _natural(name: str) -> list:
    return [
        int(part) if place % 2 else part
        for place, part in enumerate(re.split("([0-9]{1,9})", name))
    ]


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(name.removeprefix("transformer_blocks.") for name in names[:LISTED]) + more
