"""What of a LoRA a pruned model can use: which of its targets are there, which were removed or
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
    """Names of a LoRA's modules by what becomes of them. `halved`: those of the reached ones of
    which a part has no place any more; `unknown`: not of this architecture."""

    reached: tuple[str, ...] = ()
    halved: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    projected: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return len(self.reached) + len(self.removed) + len(self.projected) + len(self.unknown)

    def text(self) -> str:
        """ "covers 15 of 24 modules; 9 belong to removed blocks", then names."""
        parts = [f"covers {len(self.reached)} of {self.count} modules"]
        parts += [f"{len(names)} {words}" for words, names in self._missed() if names]
        lines = ["; ".join(parts)]
        lines += [f"{words}: {_listed(names)}" for words, names in self._named() if names]
        return "\n".join(lines)

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
    """targets: weights of the full model that a LoRA changes, by diffusers' names
    (`transformer_blocks.3.attn...`)."""
    places = {place.index: place for place in layout.places}
    prefixes = {
        architecture.block_prefix(config, index): index for index in range(layout.num_blocks)
    }
    found: dict[str, list[str]] = {"reached": [], "halved": [], "removed": [], "projected": []}
    for name in sorted(set(targets), key=_natural):
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is None:
            found["reached"].append(name)
            continue
        place, part = places.get(prefixes[prefix]), name.removeprefix(prefix)
        if place is None:
            found["removed"].append(name)
        elif part.startswith(gone_parts(architecture, place)):
            found["projected"].append(name)
        else:
            found["reached"].append(name)
            if part.startswith(cut_parts(architecture, place)):
                found["halved"].append(name)
    return Coverage(
        unknown=tuple(sorted(set(unknown), key=_natural)), **{k: tuple(v) for k, v in found.items()}
    )


def gone_parts(architecture: Architecture, place: Place) -> tuple[str, ...]:
    """Beginnings of the names that a place's projections leave no weight for."""
    return tuple(name for kind in place.projections for name in architecture.replaced_names[kind])


def cut_parts(architecture: Architecture, place: Place) -> tuple[str, ...]:
    """Beginnings of the names of which a first part is left."""
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
