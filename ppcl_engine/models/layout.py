"""What stands at each place of a variant: a teacher's block or a student, and its projections. Pure
functions.

A text group (a, b] reads the modulated text of the last full block before it (method: width, text
stream); the projections that exist decide what a variant may switch on together.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..architectures import architecture_named
from ..plan import FORMS, Interval, PruningPlan, TextGroup, Variant, WidthSite, parse_sites


@dataclass(frozen=True, kw_only=True)
class Place:
    """A block that runs in a variant: the teacher's, or an interval's student."""

    index: int
    """teacher index; an interval's first block"""
    interval: Interval | None = None
    """whose student stands here; None: the teacher's block"""
    ffn: tuple[WidthSite, ...] = ()
    """the FFN sites that are on"""
    text_source: int | None = None
    """index of the place whose modulated text its text projection reads; None: the text is not
    projected"""
    steps_text: bool = False
    """it also moves the text stream on, over its whole group"""
    publishes: bool = False
    """a text group reads its modulated text"""

    @property
    def name(self) -> str:
        """The name of the weights that stand here: "3-6" is a student, "3" the teacher's block."""
        return self.interval.name if self.interval else str(self.index)

    @property
    def last(self) -> int:
        return self.interval.last if self.interval else self.index

    @property
    def is_teacher(self) -> bool:
        """The teacher's block, with nothing in it replaced."""
        return self.interval is None and not self.ffn and self.text_source is None

    @property
    def projections(self) -> tuple[str, ...]:
        """The kinds of the sites that are on here."""
        return (
            *(site.kind for site in self.ffn),
            *(("text",) if self.text_source is not None else ()),
        )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All places of a variant, in order."""

    num_blocks: int
    """the teacher's"""
    places: tuple[Place, ...]
    """in order of their indices"""
    sites: tuple[str, ...] = ()
    """names of the sites that are on"""
    notes: tuple[str, ...] = ()
    """the sites that were switched off because of an interval, and why"""


def full_layout(num_blocks: int) -> Layout:
    return Layout(num_blocks=num_blocks, places=tuple(Place(index=i) for i in range(num_blocks)))


def checked(plan: PruningPlan) -> PruningPlan:
    """The plan itself. Raises ValueError naming a part that does not fit its architecture."""
    architecture = architecture_named(plan.architecture)
    try:
        sections, count = architecture.sections(plan.config), architecture.num_blocks(plan.config)
    except KeyError as missing:
        raise ValueError(
            f"the model configuration in the plan lacks {missing}; restore the plan"
        ) from None
    except (TypeError, AttributeError):  # text, lists or null where numbers belong
        raise ValueError(
            "the model configuration in the plan gives no number of layers; restore the plan"
        ) from None
    if count != plan.num_blocks:
        raise ValueError(
            f"the plan has {plan.num_blocks} blocks, but its model configuration has {count}; restore the plan"
        )
    for interval in plan.intervals:
        if (
            len(
                {next((n for n, s in enumerate(sections) if i in s), None) for i in interval.blocks}
            )
            > 1
        ):
            runs = ", ".join(f"{s.start}-{s.stop - 1}" for s in sections)
            raise ValueError(
                f"interval {interval.name} holds blocks of two kinds ({runs}); end it where one kind ends"
            )
    for site in plan.sites:
        kinds = architecture.site_kinds(plan.config, site.block)
        if site.kind not in kinds:
            raise ValueError(
                f"width site {site.name}: block {site.block} does not have this part; it has: {', '.join(kinds)}"
            )
        forms = architecture.forms.get(site.kind, FORMS)
        if site.form not in forms:
            raise ValueError(
                f"width site {site.name}: form {site.form!r} is unknown; known: {', '.join(forms)}"
            )
    return plan


def sites_named(plan: PruningPlan, text: str, form: str) -> tuple[WidthSite, ...]:
    """ "ffn_image:2 text:51-59" -> sites of the plan's model; one that cannot have `form` has the
    one that it can. Raises ValueError naming the part that is not a site."""
    return parse_sites(text, form, architecture_named(plan.architecture).forms)


def layout_of(plan: PruningPlan, variant: Variant) -> Layout:
    """The places of a variant. A site whose projection was not trained for the block that stands
    there is switched off, and `notes` says so."""
    intervals = {interval.first: interval for interval in checked(plan).intervals_of(variant)}
    everything = _names({interval.first: interval for interval in plan.intervals}, plan.num_blocks)
    here = _names(intervals, plan.num_blocks)
    on, notes, ffn, text = [], [], {}, {}
    for name in variant.sites:
        reason = _misfit(plan, name, here, everything)
        if reason:
            notes.append(f"{name} is off: {reason}")
            continue
        on.append(name)
        if isinstance(site := plan.site(name), TextGroup):
            text |= _text_places(plan, site, here)
        else:
            ffn.setdefault(site.block, []).append(site)
    sources = {source for source, _ in text.values()}
    places = [
        Place(
            index=index,
            interval=intervals.get(index),
            ffn=tuple(ffn.get(index, ())),
            text_source=text[index][0] if index in text else None,
            steps_text=index in text and text[index][1],
            publishes=index in sources,
        )
        for index in here
    ]
    return Layout(
        num_blocks=plan.num_blocks, places=tuple(places), sites=tuple(on), notes=tuple(notes)
    )


def group_places(layout: Layout, group: TextGroup) -> tuple[Place, list[Place]]:
    """(the full place before the group, the group's own places)"""
    before = [place for place in layout.places if place.index < group.first]
    return before[-1], [
        place for place in layout.places if group.first <= place.index <= group.last
    ]


def _names(intervals: dict[int, Interval], num_blocks: int) -> dict[int, str]:
    """index -> name of what stands there, in order; indices inside an interval are left out."""
    gaps = {index for interval in intervals.values() for index in interval.blocks[1:]}
    return {
        i: intervals[i].name if i in intervals else str(i)
        for i in range(num_blocks)
        if i not in gaps
    }


def _misfit(
    plan: PruningPlan, name: str, here: dict[int, str], everything: dict[int, str]
) -> str | None:
    """Why the site cannot be on with the blocks that stand here; None when it can."""
    site = plan.site(name)
    fitted = {s.block: s.fitted for s in site.sites}
    if isinstance(site, TextGroup):
        source = max(index for index in here if index < site.first)
        if here[source] != everything.get(source):
            return f"the block before it ({here[source]}) is not the one that it was trained behind"
    elif site.block not in here:
        return f"block {site.block} is replaced"
    for block, names in fitted.items():
        if block in here and here[block] != everything.get(block) and here[block] not in names:
            return f"no projection was trained for block {here[block]}"
    return None


def _text_places(
    plan: PruningPlan, group: TextGroup, here: dict[int, str]
) -> dict[int, tuple[int, bool]]:
    """index -> (source, whether it steps the text, which it need not do where nothing reads the
    text any more)."""
    source = max(index for index in here if index < group.first)
    members = [index for index in here if group.first <= index <= group.last]
    read = "text" in architecture_named(plan.architecture).used_streams(plan.config, group.last)
    return {index: (source, read and index == members[-1]) for index in members}


def projections_of(plan: PruningPlan, variant: Variant) -> list[tuple[str, str]]:
    """(place's name, site kind) of every projection that some subset of the variant switches on."""
    natural = {place.index: place.name for place in layout_of(plan, plan.everything()).places}
    names_and_kinds: dict[tuple[str, str], None] = {}
    for site in (s for name in variant.sites for s in plan.site(name).sites):
        names = [natural[site.block]] if site.block in natural else []
        for name in (*names, *site.fitted):
            if "-" not in name or name in variant.intervals:
                names_and_kinds[name, site.kind] = None
    return list(names_and_kinds)
