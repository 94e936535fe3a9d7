"""PPCL_Variant: another size of a switchable model, on a branch of its own, without reading a file."""

from __future__ import annotations

import math

from comfy_api.v0_0_2 import io

from ...ppcl_engine.models.layout import layout_of
from ...ppcl_engine.plan import PruningPlan, Variant
from ..host.switching import size_of, variant_of, with_variant
from ..loading.bundles import variant_names
from ..loading.request import variant_in
from ..node import Node
from .patcher import described

KEEP, BY_SIZE = "as it is", "by size"


def choose(model, variant: str, size: float, on: str, off: str):
    """(the new branch, what it runs in words). size: for BY_SIZE, the largest share of the full
    model's parameters; on, off: names of parts to switch."""
    plan = switchable_plan(model)
    chosen = _by_name(model, plan, variant, size)
    chosen = with_parts(plan, chosen, on.replace(",", " ").split(), off.replace(",", " ").split())
    new = with_variant(model, chosen)
    return new, "\n".join([described(new), *layout_of(plan, chosen).notes])


def switchable_plan(model) -> PruningPlan:
    """The plan of a switchable model. Raises ValueError for any other model."""
    pruned = getattr(model.model.diffusion_model, "ppcl", None)
    if pruned is None or pruned.plan is None:
        raise ValueError("this MODEL is not a PPCL bundle; load one with Load Pruned Model (PPCL)")
    if not pruned.structure.switchable:
        raise ValueError(
            "only one variant of this model was loaded; set switchable to on in Load Pruned Model (PPCL)"
        )
    return pruned.plan


def _by_name(model, plan: PruningPlan, name: str, size: float) -> Variant:
    if name == KEEP:
        return variant_of(model)
    if name == BY_SIZE:
        return by_size(model, plan, size)
    variant = variant_in(plan, name)
    if variant.tuned:
        raise ValueError(
            f"variant {name!r} is fine-tuned, with weights of its own; load it with switchable set to off"
        )
    return variant


def by_size(model, plan: PruningPlan, share: float) -> Variant:
    """Replaces parts of the full model, those with the least measured damage first, until its
    parameters are within the share. Parts that were not measured come last."""
    transformer, names = model.model.diffusion_model, []
    full, _ = size_of(transformer, layout_of(plan, Variant(name="full")))
    parts = sorted(
        [*plan.intervals, *plan.switches],
        key=lambda part: math.inf if part.score is None else part.score,
    )
    for part in parts:
        if size_of(transformer, layout_of(plan, _of(names)))[0] <= share * full:
            break
        names.append(part.name)
    return _of(names)


def with_parts(plan: PruningPlan, variant: Variant, on: list[str], off: list[str]) -> Variant:
    """The variant with single intervals and sites switched on, or given back to the teacher. Raises
    ValueError for unknown names."""
    for name in (*on, *off):
        plan.site(name) if ":" in name else plan.interval(name)
    if not on and not off:
        return variant
    names = [n for n in (*variant.intervals, *variant.sites) if n not in off]
    return _of(names + [n for n in on if n not in names and n not in off])


def _of(names: list[str]) -> Variant:
    """The variant that these intervals and sites make."""
    intervals, sites = (tuple(n for n in names if (":" in n) == site) for site in (False, True))
    return Variant(name=",".join(names) or "full", intervals=intervals, sites=sites)


class ChooseVariant(Node):
    LOOKED_UP = ("variant",)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PPCL_Variant",
            display_name="Choose Variant (PPCL)",
            category="PPCL",
            description="Another size of a loaded bundle. Any number of branches share the weights of one loaded model.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="A bundle, loaded with switchable on; or any branch of it."
                ),
                io.Combo.Input(
                    "variant",
                    options=[KEEP, BY_SIZE, *variant_names()],
                    tooltip="A size of the bundle by name.",
                ),
                io.Float.Input(
                    "size",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip='For "by size": at most this share of the full model\'s parameters.',
                ),
                io.String.Input(
                    "on", default="", tooltip='Parts to switch on as well, as "3-4 text:51-59".'
                ),
                io.String.Input(
                    "off",
                    default="",
                    tooltip='Parts to give back to the teacher, as "3-4 ffn_image:2".',
                ),
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="text")],
        )

    @classmethod
    def perform(cls, model, variant, size, on, off) -> io.NodeOutput:
        return io.NodeOutput(*choose(model, variant, size, on, off))
