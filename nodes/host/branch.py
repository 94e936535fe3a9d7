"""What a branch of the graph runs: layout, name, size and damage of a variant of a pruned model, or
of a plain model."""

from __future__ import annotations

import torch

from ...ppcl_engine.architectures.folded import FOLDING
from ...ppcl_engine.models.layout import Layout, full_layout, layout_of
from ...ppcl_engine.models.weights import parameter_count
from ...ppcl_engine.plan import FULL, PruningPlan, Variant
from ...ppcl_engine.system.numbers import bytes_text, count_text
from . import host_of_model
from .base import Host
from .folded import folding_in
from .structure import config_of, plan_of_layout
from .switching import size_of, tensors_in, variant_of

PREFIX = "diffusion_model."


def layout_in(model) -> Layout:
    """What stands where in the model that a branch runs."""
    parts = _parts(model)
    if parts is None:
        host, config = known(model)
        return full_layout(host.engine.num_blocks(config))
    if parts.structure.switchable:
        return layout_of(parts.plan, variant_of(model))
    return parts.structure.layout


def _parts(model):
    """None: an untouched model of the host."""
    return getattr(model.model.diffusion_model, "ppcl", None)


def known(model) -> tuple[Host, dict]:
    """(the host of its architecture, the engine's configuration of the full model). Raises
    ValueError for an architecture that is not supported."""
    if parts := _parts(model):
        return parts.structure.host, parts.structure.config
    host = host_of_model(model)
    return host, config_of(host, tensors_in(model.model.diffusion_model))


def _switchable(model) -> bool:
    parts = _parts(model)
    return parts is not None and parts.structure.switchable


def name_of(model) -> str:
    if _switchable(model):
        return variant_of(model).name
    layout = layout_in(model)
    return FULL if layout.places == full_layout(layout.num_blocks).places else "pruned"


def sizes(model) -> tuple[int, int]:
    """(parameters, bytes) of what a branch runs."""
    return size_of(model.model.diffusion_model, layout_in(model) if _switchable(model) else None)


def plan_in(model) -> tuple[PruningPlan, list[Variant]]:
    """(plan, variants: the branch's own first, then the named ones). For a file without a plan, one
    is made from its layout."""
    parts = _parts(model)
    plan = parts.plan if parts and parts.plan else plan_of_layout(*known(model), layout_in(model))
    if _switchable(model):
        own = variant_of(model)
        return plan, [own, *(v for v in plan.variants if v.name != own.name and not v.tuned)]
    everything = plan.everything()
    return plan, [
        Variant(name=name_of(model), intervals=everything.intervals, sites=everything.sites)
    ]


def full_parameters(model) -> int:
    """Parameters of the full model; where only one variant was loaded, they are computed from its
    configuration."""
    transformer, layout = model.model.diffusion_model, layout_in(model)
    if _switchable(model):
        return size_of(transformer, full_layout(layout.num_blocks))[0]
    host, config = known(model)
    folding = folding_in(transformer)
    config = config | ({FOLDING: folding.to_config()} if folding else {})
    with torch.device("meta"):
        blocks = [
            parameter_count(host.engine.build_block(config, index))
            for index in range(layout.num_blocks)
        ]
    there = sum(
        p.numel() for name, p in transformer.named_parameters() if host.block_name.match(name)
    )
    return parameter_count(transformer) - there + sum(blocks)


def about(model) -> str:
    """Parameters, size and damage, one line each."""
    plan, variants = plan_in(model)
    parameters, size = sizes(model)
    full = full_parameters(model)
    layout = layout_in(model)
    lines = [
        f"{variants[0].name}: {count_text(parameters)} parameters, {100 * parameters / full:.0f} % of "
        f"{count_text(full)}; {bytes_text(size)}",
        f"{len(layout.places)} of {layout.num_blocks} blocks run; {sum(len(p.projections) for p in layout.places)} parts are projected",
        folding_text(model.model.diffusion_model),
        *(damage_text(plan, variant) for variant in variants),
        *layout.notes,
    ]
    return "\n".join(line for line in lines if line)


def folding_text(transformer) -> str:
    """How modulations are folded, in words; "" where they are not."""
    folding = folding_in(transformer)
    if folding is None:
        return ""
    if folding.form == "basis":
        return f"modulations are folded: a basis of rank {folding.inputs - 1}"
    return f"modulations are folded: a table of {folding.inputs} timesteps, filled the first time a schedule is sampled"


def damage_text(plan: PruningPlan, variant: Variant) -> str:
    """The damage measured for the variant as a whole, else the sum over its parts, which is close
    while they are few; "" where neither was measured."""
    known = next((v for v in plan.variants if v.name == variant.name), variant)
    if known.damage is not None:
        return f"{variant.name}: velocity error {known.damage:.3f}"
    scores = [plan.interval(n).score for n in variant.intervals] + [
        plan.site(n).score for n in variant.sites
    ]
    if not scores or None in scores:
        return ""
    return f"{variant.name}: velocity error about {sum(scores):.3f} (the sum of its parts)"
