"""Width fits: what each projection reads, and what it has to give.

All on the teacher's own states (paper, section 3.4): an FFN's projection reads what its block or
student sees there, a text group's the modulated text of the last full block before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from ...architectures import BlockState
from ...architectures.modules import AnyModule
from ...models.assembly import Students
from ...models.layout import Layout, Place, group_places, layout_of
from ...models.streaming import Teacher
from ...plan import PruningPlan, TextGroup


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One projection to be fitted."""

    place: Place
    """a student or a teacher's block, with nothing projected in it"""
    kind: str
    """of the site"""
    form: str = "paper"
    """of an FFN: paper or gated"""
    source: Place | None = None
    """for text: the place whose modulated text it reads"""
    steps: bool = False
    """for text: it also moves the text stream on"""

    @property
    def name(self) -> str:
        return f"{self.kind} of block {self.place.name}"

    @property
    def stream(self) -> str:
        """What the projection maps: "image", "text", or "joint", both as one sequence."""
        return self.kind.removeprefix("ffn_")

    @property
    def parts(self) -> tuple[str, ...]:
        return ("map", "step") if self.steps else ("map",)


Pair = tuple[torch.Tensor, torch.Tensor]


def fits_of(plan: PruningPlan, layout: Layout) -> list[Fit]:
    """The projections of the sites that are on."""
    fits = []
    for name in layout.sites:
        site = plan.site(name)
        if isinstance(site, TextGroup):
            source, members = group_places(layout, site)
            fits += [
                Fit(place=_bare(p), kind="text", source=_bare(source), steps=p.steps_text)
                for p in members
            ]
        else:
            place = next(p for p in layout.places if p.index == site.block)
            fits.append(Fit(place=_bare(place), kind=site.kind, form=site.form))
    return fits


def fits_of_blocks_given_back(plan: PruningPlan) -> list[Fit]:
    """Projections for the teacher's own blocks in intervals with sites, which a variant may give
    back."""
    everything, fits = plan.everything(), []
    with_sites = [i for i in plan.intervals if any(s.block in i.blocks for s in plan.sites)]
    open_to_all = plan.with_parts(
        sites=tuple(replace(s, fitted=(str(s.block),)) for s in plan.sites)
    )
    for interval in with_sites:
        names = tuple(name for name in everything.intervals if name != interval.name)
        layout = layout_of(open_to_all, replace(everything, intervals=names))
        fits += [f for f in fits_of(open_to_all, layout) if f.place.index in interval.blocks]
    return fits


def _bare(place: Place) -> Place:
    return Place(index=place.index, interval=place.interval)


def own_pair(
    fit: Fit, seen: dict[str, torch.Tensor], source_seen: dict[str, torch.Tensor] | None
) -> Pair:
    """(what the projection reads, what it has to give), [n, tokens, d] each (method: width; paper,
    section 3.4)."""
    if source_seen is not None:
        source = source_seen["text_modulated"]
        return source, seen["text_modulated"].float() - source.float()
    stream = fit.stream
    if fit.form == "gated":
        return seen[f"{stream}_ffn_input"], seen[f"{stream}_ffn_output"]
    before = seen[f"{stream}_before_ffn"]
    return before, seen[f"{stream}_after_ffn"].float() - before.float()


def counted(fit: Fit, state: BlockState, used: tuple[str, ...]) -> torch.Tensor:
    """Mask [n, tokens] of the tokens that count: no padding, and no text that nothing reads any
    more.

    used: streams that are read behind the fit's place.
    """
    if fit.stream != "joint" or "text" in used:
        return state.real(fit.stream)
    real = {"image": state.real("image"), "text": torch.zeros_like(state.real("text"))}
    return torch.cat([real[stream] for stream in state.joint_order], dim=1)


def standing_block(
    teacher: Teacher, students: Students, place: Place, block: AnyModule
) -> nn.Module:
    """What stands at a place where nothing is projected: a student, or the teacher's block, which
    was already read."""
    return (
        students.student(place.interval, teacher.dtype, teacher.device) if place.interval else block
    )
