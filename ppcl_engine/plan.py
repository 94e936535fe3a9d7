"""PruningPlan: what is replaced, by what, and what it costs. Frozen, JSON both ways.

Indices are the teacher's, from 0. An interval [first, last] includes both ends: these blocks
are replaced by one student (paper, section 3.3).
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields, replace

FORMAT_VERSION = 1
SITE_KINDS = ("text", "ffn_image", "ffn_text")
FULL = "full"


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Blocks first..last. `score`: damage on the final velocity (relative, squared) when measured;
    `stability`: share of bootstrap resamples that find this very interval; `parameters`: of its
    student, correction included; `correction`: "none", "affine" or the rank of a low-rank one."""

    first: int
    last: int
    score: float | None = None
    stability: float | None = None
    parameters: int | None = None
    correction: str = "none"

    @property
    def name(self) -> str:
        return f"{self.first}-{self.last}"

    @property
    def removed(self) -> int:
        return self.last - self.first

    @property
    def blocks(self) -> range:
        return range(self.first, self.last + 1)


@dataclass(frozen=True, kw_only=True)
class WidthSite:
    """A place in a block that a projection replaces."""

    block: int
    kind: str


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A named set of intervals (and sites) that are switched on. `damage`: relative squared velocity
    error; `flops`: of one forward at the plan's reference size."""

    name: str
    intervals: tuple[str, ...] = ()
    sites: tuple[str, ...] = ()
    parameters: int | None = None
    bytes: int | None = None
    flops: float | None = None
    milliseconds: float | None = None
    damage: float | None = None


@dataclass(frozen=True, kw_only=True)
class PruningPlan:
    """Raises ValueError, naming the part, for anything that cannot be applied."""

    architecture: str
    config: dict
    num_blocks: int
    fingerprint: str
    intervals: tuple[Interval, ...] = ()
    sites: tuple[WidthSite, ...] = ()
    variants: tuple[Variant, ...] = ()
    provenance: dict = field(default_factory=dict)
    version: int = FORMAT_VERSION

    def __post_init__(self):
        if self.version != FORMAT_VERSION:
            raise ValueError(f"plan format {self.version} is not {FORMAT_VERSION}; update ComfyUI-PPCL")
        for interval in self.intervals:
            if not 0 <= interval.first < interval.last < self.num_blocks:
                raise ValueError(
                    f"interval {interval.name} is not inside blocks 0-{self.num_blocks - 1} "
                    "with at least two blocks; correct the plan"
                )
        ordered = sorted(self.intervals, key=lambda i: i.first)
        for left, right in zip(ordered, ordered[1:], strict=False):
            if right.first <= left.last:
                raise ValueError(f"intervals {left.name} and {right.name} overlap; correct the plan")
        for site in self.sites:
            if site.kind not in SITE_KINDS:
                raise ValueError(f"width site kind {site.kind!r} is unknown; known: {', '.join(SITE_KINDS)}")
            if not 0 <= site.block < self.num_blocks:
                raise ValueError(f"width site in block {site.block}: there are {self.num_blocks} blocks")
        for variant in self.variants:
            self._check_variant(variant)

    def interval(self, name: str) -> Interval:
        for interval in self.intervals:
            if interval.name == name:
                return interval
        known = ", ".join(i.name for i in self.intervals) or "none"
        raise ValueError(f"interval {name!r} is not in the plan; it has: {known}")

    def variant(self, name: str | None) -> Variant:
        """By name; None is the smallest named variant; "full" is always there.

        A comma-separated list of intervals ("3-4,8-10") is an unnamed variant.
        """
        if name is None:
            return min(self.variants, key=lambda v: v.parameters or 0) if self.variants else self.everything()
        for variant in self.variants:
            if variant.name == name:
                return variant
        if name == FULL:
            return Variant(name=FULL)
        if re.fullmatch(r"\d+-\d+(,\d+-\d+)*", name):
            return self._check_variant(Variant(name=name, intervals=tuple(name.split(","))))
        known = ", ".join([v.name for v in self.variants] + [FULL])
        raise ValueError(f"variant {name!r} is not in the plan; it has: {known}, or intervals as in '3-4,8-10'")

    def _check_variant(self, variant: Variant) -> Variant:
        for name in variant.intervals:
            self.interval(name)
        if len(set(variant.intervals)) < len(variant.intervals):
            raise ValueError(f"variant {variant.name!r} names an interval twice; name each once")
        return variant

    def intervals_of(self, variant: Variant) -> list[Interval]:
        return [self.interval(name) for name in variant.intervals]

    def everything(self) -> Variant:
        return Variant(name="all", intervals=tuple(i.name for i in self.intervals))

    def check_teacher(self, architecture: str, fingerprint: str, where: object) -> None:
        if architecture != self.architecture:
            raise ValueError(f"{where} is {architecture}, the plan is for {self.architecture}; choose its base model")
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"{where} (fingerprint {fingerprint[:12]}) is not the teacher of this plan "
                f"({self.fingerprint[:12]}); choose the base model it was made from"
            )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def with_parts(self, **parts) -> PruningPlan:
        return replace(self, **parts)


def plan_from_json(text: str, where: object = "plan") -> PruningPlan:
    """The inverse of `PruningPlan.to_json`. Raises ValueError naming the unknown or missing field."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where}: a plan is a JSON object")
    if values.get("version", FORMAT_VERSION) != FORMAT_VERSION:  # its fields may be unknown too
        raise ValueError(f"{where}: plan format {values['version']} is not {FORMAT_VERSION}; update ComfyUI-PPCL")
    parts = {"intervals": Interval, "sites": WidthSite, "variants": Variant}
    for name, kind in parts.items():
        rows = values.get(name, [])
        if not isinstance(rows, list):
            raise ValueError(f"{where}: {name} is a list, found {rows!r}")
        values[name] = tuple(_build(kind, row, f"{where}: {name}") for row in rows)
    return _build(PruningPlan, values, str(where))


def _build(kind, values, where: str):
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object, found {values!r}")
    known = {f.name for f in fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}")
    values = {k: tuple(v) if k in ("intervals", "sites") and isinstance(v, list) else v for k, v in values.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def parse_intervals(text: str) -> tuple[Interval, ...]:
    """ "3-4 5-7" or "3-4,5-7" -> intervals. Raises ValueError naming the part that is not one."""
    intervals = []
    for part in text.replace(",", " ").split():
        if not re.fullmatch(r"\d+-\d+", part):
            raise ValueError(f"{part!r} is not an interval; write them as '3-4 8-10'")
        first, last = map(int, part.split("-"))
        intervals.append(Interval(first=first, last=last))
    return tuple(intervals)
