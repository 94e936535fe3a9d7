"""The report's section on width sites: what detection measured and chose, and which sites are on in
each variant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ..models.layout import Layout, layout_of
from ..plan import PruningPlan, TextGroup, WidthSite
from ..run import Run
from ..system.numbers import count_text
from ..system.schemas import read_checked_object
from ..system.tensor_files import TensorFile
from .drawings.width_charts import alignment_map, candidate_chart
from .html import NONE, Html, joined, table, tag
from .result_files import Width
from .texts import BY_HAND_TEXT, SCORE_NAMES, SCORE_TEXTS, WIDTH_TEXT


@dataclass(frozen=True)
class WidthResults:
    """The results of detect-width and distill-width in a run."""

    plan: PruningPlan
    method: str
    """how the candidates were scored: damage or cka"""
    candidates: list[dict]
    """as width.json has them"""
    places: list[str]
    """names of the rows of `alignment`"""
    alignment: dict[str, torch.Tensor]
    """kind of site -> CKA: of text [places, places], of an FFN [places]"""
    losses: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """site -> [updates] of each of its projections"""

    @property
    def by_hand(self) -> bool:
        """Whether the plan has other sites than detection chose."""
        chosen = {(row["name"], row["form"]) for row in self.candidates if row["chosen"]}
        return chosen != {(switch.name, switch.form) for switch in self.plan.switches}

    def candidate(self, switch: WidthSite | TextGroup) -> dict | None:
        wanted = switch.name, switch.form
        return next((row for row in self.candidates if (row["name"], row["form"]) == wanted), None)


def read_width(run: Run, plan: PruningPlan) -> WidthResults | None:
    """None if no width was detected."""
    if not run.width.exists():
        return None
    detected, alignment = read_checked_object(run.width, Width), TensorFile(run.alignment)
    return WidthResults(
        plan=plan,
        method=detected["method"],
        candidates=detected["candidates"],
        places=alignment.about("places", list),
        alignment=alignment.read_all(),
        losses={switch.name: list(_losses(run, plan, switch)) for switch in plan.switches},
    )


def _losses(run: Run, plan: PruningPlan, switch: WidthSite | TextGroup) -> Iterator[torch.Tensor]:
    """The losses of each projection that the site has when all intervals are on."""
    blocks = {site.block for site in switch.sites}
    for place in layout_of(plan, plan.everything()).places:
        path = run.projection(place.name, switch.kind)
        if (
            place.index in blocks
            and path.exists()
            and len(losses := TensorFile(path).read("losses"))
        ):
            yield losses


def site_rows(plan: PruningPlan) -> list[dict]:
    """The plan's switches other than intervals, for report.json."""
    return [
        {
            "name": switch.name,
            "kind": switch.kind,
            "form": switch.form,
            "score": switch.score,
        }
        for switch in plan.switches
    ]


def width_drawings(width: WidthResults) -> dict[str, bytes]:
    score = {"damage": "damage alone, on the velocity", "cka": "1 − CKA, summed over its layers"}[
        width.method
    ]
    chart = (
        {"width_candidates": candidate_chart(width.candidates, score)} if width.candidates else {}
    )
    return {
        "width_alignment": alignment_map(width.places, width.alignment, list(width.plan.switches)),
        **chart,
    }


def width_text(width: WidthResults) -> str:
    return WIDTH_TEXT + SCORE_TEXTS[width.method] + (BY_HAND_TEXT if width.by_hand else "")


def site_table(width: WidthResults) -> Html:
    """A row for each site of the plan."""
    rows = []
    for switch in width.plan.switches:
        candidate = width.candidate(switch) or {}
        rows.append(
            [
                switch.name,
                NONE if switch.kind == "text" else switch.form,
                count_text(candidate["saving"]) if candidate else NONE,
                f"{candidate['score']:.2g}" if candidate else NONE,
                _explained(candidate.get("explained", [])),
                _final_loss(width.losses[switch.name]),
            ]
        )
    heads = [
        "width site",
        "form",
        "parameters saved",
        SCORE_NAMES[width.method],
        "variance explained",
        "final loss",
    ]
    return table(heads, rows) if rows else Html()


def _explained(shares: list[float]) -> Html:
    """Mean over the site's blocks, and the range if there are several."""
    if not shares:
        return joined([NONE])
    mean = f"{100 * sum(shares) / len(shares):.1f} %"
    span = f" ({100 * min(shares):.1f}–{100 * max(shares):.1f})" if len(shares) > 1 else ""
    return joined([mean, tag("small", span)]) if span else joined([mean])


def _final_loss(losses: list[torch.Tensor]) -> str:
    """Median of the last twentieth, mean over the site's projections."""
    ends = [float(values[-max(1, len(values) // 20) :].median()) for values in losses]
    return f"{sum(ends) / len(ends):.4f}" if ends else NONE


def notes_list(layouts: dict[str, Layout]) -> Html:
    """The sites that an interval switched off in a variant, and why."""
    lines = [
        tag("li", f"{name}: {note}") for name, layout in layouts.items() for note in layout.notes
    ]
    return tag("ul", *lines, class_="notes") if lines else Html()
