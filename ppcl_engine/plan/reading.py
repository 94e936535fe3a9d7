"""Plans from JSON, intervals and sites from text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from ..system.schemas import MOST_BLOCKS, read_json_text, read_value
from .parts import FORMS, NUMBER, SITE_KINDS, Interval, WidthSite
from .pruning_plan import FORMAT_VERSION, PruningPlan

COMMON_FORMS: Mapping[str, tuple[str, ...]] = MappingProxyType({"ffn_joint": ("gated",)})
"""site kind -> the forms that every architecture has, where these are not all"""


def plan_from_json(text: str | bytes, where: object = "plan") -> PruningPlan:
    """The inverse of `PruningPlan.to_json`. Raises ValueError naming the unknown, missing or wrong
    field."""
    return plan_from_value(read_json_text(text, where), where)


def plan_from_value(values: object, where: object = "plan") -> PruningPlan:
    """The same for JSON that is already parsed."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: a plan is a JSON object")
    version = values.get("version", FORMAT_VERSION)
    if type(version) is int and version != FORMAT_VERSION:  # its fields may be unknown too
        raise ValueError(
            f"{where}: plan format {version} is not {FORMAT_VERSION}; update ComfyUI-PPCL"
        )
    return read_value(PruningPlan, values, where)


def parse_intervals(text: str) -> tuple[Interval, ...]:
    """ "3-4 5-7" or "3-4,5-7" -> intervals. Raises ValueError naming the part that is not one."""
    intervals = []
    for part in text.replace(",", " ").split():
        if not re.fullmatch(f"{NUMBER}-{NUMBER}", part):
            raise ValueError(f"{part[:40]!r} is not an interval; write them as '3-4 8-10'")
        first, last = map(int, part.split("-"))
        _check_numbers(part, (first, last))
        intervals.append(Interval(first=first, last=last))
    return tuple(intervals)


def parse_sites(
    text: str, form: str = "paper", forms: Mapping[str, tuple[str, ...]] = COMMON_FORMS
) -> tuple[WidthSite, ...]:
    """ "ffn_image:2 text:51-59" -> sites. forms: an architecture's; a site that cannot have `form`
    has the first that it can. Raises ValueError naming the part that is not one."""
    sites = []
    for part in text.replace(",", " ").split():
        match = re.fullmatch(rf"([a-z_]+):({NUMBER})(?:-({NUMBER}))?", part)
        if not match or match[1] not in SITE_KINDS:
            raise ValueError(
                f"{part[:40]!r} is not a width site; write them as 'ffn_image:2 text:51-59'"
            )
        first, last = int(match[2]), int(match[3] or match[2])
        _check_numbers(part, (first, last))
        known = FORMS[:1] if match[1] == "text" else forms.get(match[1], FORMS)
        chosen = form if form in known else known[0]
        sites += [
            WidthSite(block=block, kind=match[1], form=chosen) for block in range(first, last + 1)
        ]
    return tuple(sites)


def _check_numbers(part: str, blocks: Iterable[int]) -> None:
    if max(blocks) >= MOST_BLOCKS:
        raise ValueError(
            f"{part[:40]!r}: blocks are numbered from 0, and no model has more than {MOST_BLOCKS}"
        )
