"""PPCL_EditPlan: a plan whose intervals and width sites were chosen by hand, checked, as a new run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from comfy_api.v0_0_2 import io, ui

from ...ppcl_engine.models.layout import layout_of, sites_named
from ...ppcl_engine.plan import Interval, PruningPlan, WidthSite, parse_intervals
from ...ppcl_engine.run import Run
from ...ppcl_engine.settings.prune_settings import DistillDepthConfig, DistillWidthConfig
from ...ppcl_engine.system.atomic import read_json, write_text
from ..node import Node
from ..paths import runs
from ..widgets import help_of, inputs, values
from . import results
from .base import CATEGORY, outputs
from .runs import folder_of, run_input
from .waiting import finish_upstream, screen_of

NONE = "none"


def edited(
    plan: PruningPlan, intervals: str, sites: str, form: str, scores: dict[str, float]
) -> PruningPlan:
    """The plan with these intervals and sites. An empty text keeps what the plan has, "none" removes
    all of it. scores: measured damage of width sites, by name.

    Raises ValueError, in one line, for a text that does not name intervals or sites, and for those
    that overlap or do not fit the model.
    """
    known = {interval.name: interval for interval in plan.intervals}
    chosen, groups = plan.intervals, plan.sites
    if intervals.strip():
        chosen = tuple(known.get(i.name, i) for i in _parsed(parse_intervals, intervals))
        chosen = tuple(sorted(chosen, key=lambda interval: interval.first))
    if sites.strip():
        groups = _sites(plan, _parsed(lambda text: sites_named(plan, text, form), sites), scores)
    if (chosen, groups) == (plan.intervals, plan.sites):
        return plan
    new = plan.with_parts(intervals=chosen, sites=groups, variants=())
    layout_of(new, new.everything())
    return new


def _parsed(parse, text: str) -> tuple[Interval, ...] | tuple[WidthSite, ...]:
    return () if text.strip() == NONE else parse(text)


def _sites(
    plan: PruningPlan, sites: tuple[WidthSite, ...], scores: dict[str, float]
) -> tuple[WidthSite, ...]:
    """The sites with their measured damage; for a text site, that of its whole group."""
    planned = {(site.kind, site.block, site.form): site for site in plan.sites}
    chosen = tuple(planned.get((s.kind, s.block, s.form), s) for s in sites)
    named = {site.name: f"{group.name}" for group in _groups(plan, chosen) for site in group.sites}
    return tuple(replace(s, score=scores.get(named.get(s.name, s.name), s.score)) for s in chosen)


def _groups(plan: PruningPlan, sites: tuple[WidthSite, ...]):
    return plan.with_parts(
        intervals=(), sites=tuple(s for s in sites if s.kind == "text"), variants=()
    ).text_groups


def measured_sites(folder: Path) -> dict[str, float]:
    """Damage of every candidate in the search for width sites, by name; empty without a search."""
    path = Run(folder).width
    rows = read_json(path)["candidates"] if path.exists() else []
    return {row["name"]: row["score"] for row in rows}


def plan_file(run: str) -> Path:
    return Run(folder_of(run)).plan


class EditPlan(Node):
    FILES = {"run": plan_file}

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PPCL_EditPlan",
            display_name="Edit Plan (PPCL)",
            category=CATEGORY,
            description="Intervals and width sites by hand, checked, with the damage that was measured for them.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                run_input(tooltip="A run of Detect (PPCL) or a later one."),
                *inputs(
                    DistillDepthConfig,
                    "intervals",
                    intervals={
                        "tooltip": "The intervals of the plan, as '3-4 8-10'. Empty keeps them, none removes all."
                    },
                ),
                *inputs(
                    DistillWidthConfig,
                    "sites form",
                    sites={
                        "tooltip": "The width sites, as 'ffn_image:2 text:51-59'. Empty keeps them, none removes all."
                    },
                    form={
                        "tooltip": f"Of the FFN projections that sites names. {help_of(DistillWidthConfig, 'form')}"
                    },
                ),
            ],
            outputs=outputs("layer map"),
        )

    @classmethod
    def perform(cls, run, intervals, sites, form) -> io.NodeOutput:
        given = values(DistillWidthConfig, {"sites": sites, "form": form}) | values(
            DistillDepthConfig, {"intervals": intervals}
        )
        finish_upstream(run, True, screen_of(cls))
        folder = folder_of(run)
        plan = edited(Run(folder).load_plan(), scores=measured_sites(folder), **given)
        name = (
            runs()
            .derive("edit", run, lambda f: write_text(Run(f).plan, plan.to_json() + "\n"), given)
            .name
        )
        picture = results.map_picture(plan)
        text = results.plan_text(plan, results.damage_table(folder))
        screen_of(cls).say(text)
        return io.NodeOutput(name, picture, text, ui=ui.PreviewImage(picture, cls=cls))
