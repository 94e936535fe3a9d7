"""What a pruned model is, seen: its layer map, what reaches it of a LoRA, its pictures beside those of others."""

from __future__ import annotations

import copy
import io as bytes_io
import re

import comfy.lora
import comfy.lora_convert
import comfy.utils
import numpy as np
import torch
from comfy_api.v0_0_2 import io, ui
from PIL import Image

from ..ppcl_engine import side_by_side as sheet
from ..ppcl_engine.architectures import Architecture
from ..ppcl_engine.checkpoint import expected_shapes
from ..ppcl_engine.layout import layout_of
from ..ppcl_engine.lora import Coverage, coverage
from ..ppcl_engine.pictures import layer_map
from .branch import PREFIX, about, full_parameters, known, layout_in, name_of, plan_in, sizes
from .clock import seconds_a_step
from .host.folded import folding_in
from .host.parts import size_of
from .node import Node
from .paths import lora_files, lora_path

MOST_COLUMNS = 6
SUFFIX = re.compile(r"\.(lora|alpha|dora_scale|diff|diff_b|set_weight|w_norm|b_norm|hada_|lokr_|oft_|[ab][12]\b).*$")


def map_of(model) -> torch.Tensor:
    """Picture [1, height, width, 3]: this branch in the first row, the file's named variants below it."""
    plan, variants = plan_in(model)
    parameters = {v.name: parameters_of(model, plan, v) for v in variants if v.parameters}
    parameters[variants[0].name] = sizes(model)[0]
    return picture_of(layer_map(plan, variants, parameters, full_parameters(model)))


def parameters_of(model, plan, variant) -> int:
    """As the plan says; where modulations were folded away since, as they are counted here."""
    transformer = model.model.diffusion_model
    if folding_in(transformer) is None or not transformer.ppcl.structure.switchable:
        return variant.parameters
    return size_of(transformer, layout_of(plan, variant))[0]


def picture_of(png: bytes) -> torch.Tensor:
    pixels = np.asarray(Image.open(bytes_io.BytesIO(png)).convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels / 255)[None]


def lora_report(model, tensors: dict[str, torch.Tensor]) -> Coverage:
    """By the host's own reading of LoRA files, against the names of the full model."""
    host, config = known(model)
    shapes = expected_shapes(host.engine, config)
    whole = copy.copy(model.model)
    names = {f"{PREFIX}{host.engine.to_comfyui(key, shapes).name}" for key in shapes}
    whole.__dict__["state_dict"] = lambda: dict.fromkeys(names)
    keys = comfy.lora.model_lora_keys_unet(whole, {})
    converted = comfy.lora_convert.convert_lora(tensors)
    loaded = comfy.lora.load_lora(converted, keys, log_missing=False)
    used = {key for key, target in keys.items() if target in loaded}
    left = {module for name in converted if (module := SUFFIX.sub("", name)) not in used}
    targets = [key for target in loaded for key in _engine_names(host.engine, target, shapes)]
    return coverage(host.engine, config, targets, left, layout_in(model))


def _engine_names(engine: Architecture, target, shapes: dict) -> list[str]:
    """diffusers' names of what a change reaches. The host names rows of a weight as (name, (0, first, count), ...)."""
    name, rows = (target, None) if isinstance(target, str) else target[:2]
    keys = engine.from_comfyui(name.removeprefix(PREFIX))
    if rows is None:
        return list(keys)
    _, start, count = rows
    found = []
    for key in keys:
        part = engine.to_comfyui(key, shapes)
        first = min(part.pieces) * shapes[key][0] // len(part.pieces)
        if start < first + shapes[key][0] and first < start + count:
            found.append(key)
    return found


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
    """ "small, folded: table", "full, 50 % zero" """
    folding, sparsity = folding_in(model.model.diffusion_model), getattr(model.model, "ppcl_sparsity", None)
    parts = [name_of(model), *([f"folded: {folding.form}"] if folding else []), *([sparsity] if sparsity else [])]
    return ", ".join(parts)


class Info(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PPCL_Info",
            display_name="Pruned Model Info (PPCL)",
            category="PPCL",
            description="The layer map of a pruned model: kept, replaced, switched back, projected; its size and damage.",
            is_output_node=True,
            inputs=[io.Model.Input("model", tooltip="A pruned MODEL, or any of the same architectures.")],
            outputs=[io.Image.Output(display_name="layer map"), io.String.Output(display_name="text")],
        )

    @classmethod
    def perform(cls, model) -> io.NodeOutput:
        picture = map_of(model)
        return io.NodeOutput(picture, about(model), ui=ui.PreviewImage(picture, cls=cls))


class LoraReport(Node):
    FILES = {"lora": lora_path}

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PPCL_LoraReport",
            display_name="LoRA Report (PPCL)",
            category="PPCL",
            description="What of a LoRA reaches a pruned model, and what belongs to blocks or parts that are gone.",
            inputs=[
                io.Model.Input("model", tooltip="The pruned model, before or behind its LoRA loader."),
                io.Combo.Input("lora", options=lora_files(), tooltip="A file of models/loras."),
            ],
            outputs=[io.String.Output(display_name="text")],
        )

    @classmethod
    def perform(cls, model, lora) -> io.NodeOutput:
        tensors = comfy.utils.load_torch_file(str(lora_path(lora)), safe_load=True)
        return io.NodeOutput(f"{lora} on {name_of(model)}: {lora_report(model, tensors).text()}")


class Compare(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = []
        for number in range(1, MOST_COLUMNS + 1):
            optional = number > 2
            inputs += [
                io.Model.Input(f"model_{number}", optional=optional, tooltip="The MODEL that goes into the sampler."),
                io.Image.Input(f"image_{number}", optional=optional, tooltip="What was drawn with it."),
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
                raise ValueError(f"model_{number} and image_{number} belong together; connect both or none")
            if model is not None:
                models, pictures = [*models, model], [*pictures, picture]
        found = compared(models, pictures)
        return io.NodeOutput(found, ui=ui.PreviewImage(found, cls=cls))
