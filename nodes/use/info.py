"""PPCL_Info: the layer map of a pruned model, its size and damage."""

from __future__ import annotations

import torch
from comfy_api.v0_0_2 import io, ui

from ...ppcl_engine.models.layout import layout_of
from ...ppcl_engine.report.drawings.layer_map import layer_map
from ..host.branch import about, full_parameters, plan_in, sizes
from ..host.folded import folding_in
from ..host.switching import size_of
from ..node import Node
from ..pictures import picture_of


def map_of(model) -> torch.Tensor:
    """The layer map [1, height, width, 3]: this branch in the first row, below it the file's named
    variants."""
    plan, variants = plan_in(model)
    parameters = {v.name: parameters_of(model, plan, v) for v in variants if v.parameters}
    parameters[variants[0].name] = sizes(model)[0]
    return picture_of(layer_map(plan, variants, parameters, full_parameters(model)))


def parameters_of(model, plan, variant) -> int:
    """A variant's parameters as the plan says; counted here if modulations were folded since."""
    transformer = model.model.diffusion_model
    if folding_in(transformer) is None or not transformer.ppcl.structure.switchable:
        return variant.parameters
    return size_of(transformer, layout_of(plan, variant))[0]


class Info(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PPCL_Info",
            display_name="Pruned Model Info (PPCL)",
            category="PPCL",
            description="The layer map of a pruned model: kept, replaced, switched back, projected; its size and damage.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="A pruned MODEL, or any of the same architectures.")
            ],
            outputs=[
                io.Image.Output(display_name="layer map"),
                io.String.Output(display_name="text"),
            ],
        )

    @classmethod
    def perform(cls, model) -> io.NodeOutput:
        picture = map_of(model)
        return io.NodeOutput(picture, about(model), ui=ui.PreviewImage(picture, cls=cls))
