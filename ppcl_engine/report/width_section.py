"""The report's part about width sites: what detection saw, what was chosen, which ones a variant
has on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from ..models.layout import Layout, layout_of
from ..plan import PruningPlan, TextGroup, WidthSite
from ..run import Run
from ..system.tensor_files import TensorFile
from .drawings.width_charts import alignment_map, candidate_chart
from .html import NONE, Html, joined, table, tag
from .numbers import count_text
from .result_files import Width, read_result
from .texts import BY_HAND_TEXT, SCORE_NAMES, SCORE_TEXTS, WIDTH_TEXT


@dataclass(frozen=True)
class WidthResults:
    """method, candidates: of width.json; places: names of the rows of `alignment`; losses: site ->
    [updates] each."""

    plan: PruningPlan
    method: str
    candidates: list[dict]
    places: list[str]
    alignment: dict[str, torch.Tensor]
    losses: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    @property
    def by_hand(self) -> bool:
        """The plan has other sites than detection chose."""
        chosen = {(row["name"], row["form"]) for row in self.candidates if row["chosen"]}
        return chosen != {(switch.name, switch.form) for switch in self.plan.switches}

    def candidate(self, switch: WidthSite | TextGroup) -> dict | None:
        wanted = switch.name, switch.form
        return next((row for row in self.candidates if (row["name"], row["form"]) == wanted), None)


def read_width(run: Run, plan: PruningPlan) -> WidthResults | None:
    """None where no width was detected."""
    if not run.width.exists():
        return None
    found, alignment = read_result(run.width, Width), TensorFile(run.alignment)
    return WidthResults(
        plan=plan,
        method=found["method"],
        candidates=found["candidates"],
        places=alignment.about("places", list),
        alignment=alignment.read_all(),
        losses={switch.name: list(_losses(run, plan, switch)) for switch in plan.switches},
    )


def _losses(run: Run, plan: PruningPlan, switch: WidthSite | TextGroup) -> Iterator[torch.Tensor]:
    """Of every projection that the site has with all intervals on."""
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
    """For report.json: what can be switched besides intervals."""
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
    """A row a site of the plan."""
    rows = []
    for switch in width.plan.switches:
        found = width.candidate(switch) or {}
        rows.append(
            [
                switch.name,
                NONE if switch.kind == "text" else switch.form,
                count_text(found["saving"]) if found else NONE,
                f"{found['score']:.2g}" if found else NONE,
                _explained(found.get("explained", [])),
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
    """Mean over the site's blocks, and the range where there are several."""
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
    """Which sites of a variant went off with an interval, and why."""
    lines = [
        tag("li", f"{name}: {note}") for name, layout in layouts.items() for note in layout.notes
    ]
    return tag("ul", *lines, class_="notes") if lines else Html()
