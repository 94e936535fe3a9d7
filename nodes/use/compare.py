"""PPCL_Compare: the pictures of several models side by side, with size and speed."""

from __future__ import annotations

import torch
from comfy_api.v0_0_2 import io, ui

from ...ppcl_engine.report.drawings import side_by_side as sheet
from ..host.branch import name_of, sizes
from ..host.folded import folding_in
from ..node import Node
from ..sampling.step_timer import seconds_a_step

MOST_COLUMNS = 6


def compared(models: list, pictures: list[torch.Tensor]) -> torch.Tensor:
    columns = []
    for model, picture in zip(models, pictures, strict=True):
        parameters, size = sizes(model)
        columns.append(
            sheet.Column(
                name=column_name(model),
                pictures=picture,
                parameters=parameters,
                bytes=size,
                seconds=seconds_a_step(model),
            )
        )
    return sheet.side_by_side(columns)


def column_name(model) -> str:
    """What a column shows, such as "small, folded: table" or "full, 50 % zero"."""
    folding = folding_in(model.model.diffusion_model)
    folded = f"folded: {folding.form}" if folding else None
    sparsity = getattr(model.model, "ppcl_sparsity", None)
    return ", ".join(filter(None, (name_of(model), folded, sparsity)))


class Compare(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = []
        for number in range(1, MOST_COLUMNS + 1):
            optional = number > 2
            inputs += [
                io.Model.Input(
                    f"model_{number}",
                    optional=optional,
                    tooltip="The MODEL that goes into the sampler.",
                ),
                io.Image.Input(
                    f"image_{number}", optional=optional, tooltip="What was drawn with it."
                ),
            ]
        return io.Schema(
            node_id="PPCL_Compare",
            display_name="Compare Variants (PPCL)",
            category="PPCL",
            description="Variants side by side in one picture, with size and seconds a step under each.",
            is_output_node=True,
            inputs=inputs,
            outputs=[io.Image.Output()],
        )

    @classmethod
    def perform(cls, **given) -> io.NodeOutput:
        models, pictures = [], []
        for number in range(1, MOST_COLUMNS + 1):
            model, picture = given.get(f"model_{number}"), given.get(f"image_{number}")
            if (model is None) != (picture is None):
                raise ValueError(
                    f"model_{number} and image_{number} belong together; connect both or none"
                )
            if model is not None:
                models, pictures = [*models, model], [*pictures, picture]
        picture_sheet = compared(models, pictures)
        return io.NodeOutput(picture_sheet, ui=ui.PreviewImage(picture_sheet, cls=cls))
