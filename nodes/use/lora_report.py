"""PPCL_LoraReport: what of a LoRA reaches a pruned model, in words and as a picture of its energy."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import comfy.utils
import torch
from comfy_api.v0_0_2 import io, ui

from ...ppcl_engine.algorithms.lora.energies import energies, share_text
from ...ppcl_engine.architectures import Architecture
from ...ppcl_engine.models.lora import Coverage, coverage
from ...ppcl_engine.models.lora_files import LoraFile
from ...ppcl_engine.models.weights import expected_shapes
from ...ppcl_engine.report.drawings.canvas import VERMILION
from ...ppcl_engine.report.drawings.lora_map import lora_map
from ..host.branch import PREFIX, known, layout_in, name_of
from ..node import Node
from ..paths import lora_files, lora_path
from ..pictures import picture_of, text_card

SUFFIX = re.compile(
    r"\.(lora|alpha|dora_scale|diff|diff_b|set_weight|w_norm|b_norm|hada_|lokr_|oft_|[ab][12]\b).*$"
)


def lora_report(model, tensors: dict[str, torch.Tensor]) -> Coverage:
    """What of a LoRA reaches a model, as the host itself reads the file against the full model's
    names."""
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
    """Diffusers' names of the tensors that a change reaches. A target is a name, or, for some rows of
    a weight, (name, (0, first, count), ...)."""
    name, rows = (target, None) if isinstance(target, str) else target[:2]
    keys = engine.from_comfyui(name.removeprefix(PREFIX))
    if rows is None:
        return list(keys)
    _, start, count = rows
    names = []
    for key in keys:
        part = engine.to_comfyui(key, shapes)
        first = min(part.pieces) * shapes[key][0] // len(part.pieces)
        if start < first + shapes[key][0] and first < start + count:
            names.append(key)
    return names


def energy_report(model, path: Path, title: str) -> tuple[torch.Tensor, str]:
    """(picture, line) of where a LoRA's energy is. Of a file that the engine cannot read as a LoRA of
    this model, why."""
    host, config = known(model)
    layout = layout_in(model)
    try:
        rows, uncounted = energies(LoraFile(path, host.engine, config), host.engine, config, layout)
    except ValueError as error:
        return text_card(str(error), VERMILION), ""
    return picture_of(lora_map(title, rows, layout.num_blocks)), share_text(rows, uncounted)


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
                io.Model.Input(
                    "model", tooltip="The pruned model, before or behind its LoRA loader."
                ),
                io.Combo.Input("lora", options=lora_files(), tooltip="A file of models/loras."),
            ],
            is_output_node=True,
            outputs=[
                io.String.Output(display_name="text"),
                io.Image.Output(
                    display_name="energy",
                    tooltip="The share of the LoRA's energy in every block, and what became of the block.",
                ),
            ],
        )

    @classmethod
    def perform(cls, model, lora) -> io.NodeOutput:
        tensors = comfy.utils.load_torch_file(str(lora_path(lora)), safe_load=True)
        title = f"{lora} on {name_of(model)}"
        picture, line = energy_report(model, lora_path(lora), title)
        text = f"{title}: {lora_report(model, tensors).text()}"
        if line:
            text = f"{text}\n{line}"
        return io.NodeOutput(text, picture, ui=ui.PreviewImage(picture, cls=cls))
