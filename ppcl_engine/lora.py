"""What of a LoRA a pruned model can use: which of its targets are there, which were removed or projected."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .layout import Layout, Place

BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
STREAMS = {"ffn_image": "img", "ffn_text": "txt"}
TEXT_PARTS = ("txt_mod.", "txt_mlp.", "attn.to_add_out.")
"""of a Qwen-Image block: what a text projection leaves no place for"""
LISTED = 12


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Names of a LoRA's modules by what becomes of them. `halved`: those of the reached ones whose second half has no
    place any more; `unknown`: not of this architecture."""

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
            ("reached in its first half", self.halved),
            ("reached", self.reached),
        )


def coverage(targets: Iterable[str], unknown: Iterable[str], layout: Layout) -> Coverage:
    """targets: weights of the full model that a LoRA changes, by the model's names (`transformer_blocks.3.attn...`)."""
    places = {place.index: place for place in layout.places}
    found: dict[str, list[str]] = {"reached": [], "halved": [], "removed": [], "projected": []}
    for name in sorted(set(targets), key=_natural):
        match = BLOCK.match(name)
        place = places.get(int(match[1])) if match else None
        if match and place is None:
            found["removed"].append(name)
        elif match and match[2].startswith(gone_parts(place)):
            found["projected"].append(name)
        else:
            found["reached"].append(name)
            if match and match[2].startswith(halved_parts(place)):
                found["halved"].append(name)
    return Coverage(unknown=tuple(sorted(set(unknown), key=_natural)), **{k: tuple(v) for k, v in found.items()})


def gone_parts(place: Place) -> tuple[str, ...]:
    """Beginnings of the names that a place's projections leave no weight for."""
    ffn = tuple(f"{STREAMS[site.kind]}_mlp." for site in place.ffn)
    return ffn + (TEXT_PARTS if place.text_source is not None else ())


def halved_parts(place: Place) -> tuple[str, ...]:
    """The paper's FFN leaves the first half of a modulation."""
    return tuple(f"{STREAMS[site.kind]}_mod." for site in place.ffn if site.form == "paper")


def _natural(name: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(name.removeprefix("transformer_blocks.") for name in names[:LISTED]) + more
