"""Our entries in ComfyUI's list of model classes: with them, every loader of ComfyUI reads pruned
models too.

An entry claims the files that ComfyUI cannot load by itself (pruned ones, and models of other
sizes), and has ComfyUI's own class built with what `building` puts in place of its blocks.
"""

from __future__ import annotations

import inspect
import logging
from functools import cache
from pathlib import Path

import comfy.supported_models
import torch
from torch import nn

from ...ppcl_engine.models.weights import COMFYUI_PREFIX
from ...ppcl_engine.system.two_of_four import decompressed
from .base import Host
from .blocks import Texts
from .building import check_tensors, exchanged_blocks, finish, inputs_of
from .detecting import detected_structure, is_pruned
from .formats import grouped, passed_on
from .quantised import FORMAT, IN_FILE, Held, Quantised, expanded
from .saving import file_of
from .structure import FileTensors

PATHS_IN_LOADERS = ("unet_path", "ckpt_path")
"""names of the variables in which the host's loaders hold the path of a model file"""


class PrunedConfig:
    """Mixed in before one of the host's config classes; `config_classes` makes the combinations."""

    host: Host

    @classmethod
    def matches(cls, unet_config, state_dict=None, *arguments, **named) -> bool:
        """The host asks this about every file that it loads, so an error here is logged, and the
        host goes on with its next class."""
        if state_dict is None:
            return False
        try:
            known = super().matches(unet_config, None, *arguments, **named)
            return known and is_ours(cls.host, transformer_of(cls.host, state_dict))
        except (
            Exception
        ) as error:  # whatever the file holds: it is the host's to load, with or without us
            log_once(
                f"{file_being_loaded()}: PPCL left this file to ComfyUI ({type(error).__name__}: {error})"
            )
            return False

    def get_model(self, state_dict, *arguments, **named):
        self.told = told_of_formats(self)
        grouped = self._grouped(
            decompressed(transformer_of(self.host, state_dict), shapes_only=True)
        )
        tensors = {
            n: torch.empty(t.shape, device="meta") if isinstance(t, Quantised) else t
            for n, t in grouped.items()
        }
        structure = self.structure = detected_structure(self.host, tensors)
        self.unet_config |= self.host.arguments(structure.config)
        self._name_formats(self.host_names(structure.renamed(grouped)))
        given, texts = self.host_names(structure.renamed(tensors)), Texts()
        inputs = inputs_of(structure, self.manual_cast_dtype or self.unet_config.get("dtype"))
        with exchanged_blocks(structure, sorted(given), texts, inputs):
            model = super().get_model(state_dict, *arguments, **named)
        finish(model.diffusion_model, structure, texts, inputs)
        self.pruned = model.diffusion_model.ppcl
        self.marks = marks_in(self.host, model.diffusion_model)
        # with another pack's operations the model has no tensors yet to compare with
        if self.custom_operations is None:
            check_tensors(self._empty_model(sorted(given)), given | self.marks)
        return model

    def process_unet_state_dict(self, state_dict, *arguments, **named):
        tensors = self.structure.renamed(self._grouped(decompressed(state_dict)))
        by_name = self.host_names(tensors, *arguments, **named) | self.marks
        return {
            name: t for name, t in expanded(by_name) if IN_FILE or not name.endswith(f".{FORMAT}")
        }

    def _grouped(self, tensors: FileTensors) -> dict:
        """The tensors by name; a quantised matrix and its scales are one `Quantised`. Raises
        ValueError for formats that this host does not read."""
        held = {name: Held(tensor) for name, tensor in tensors.items()}
        if self.custom_operations is not None:
            by_name = passed_on(held)
        else:
            by_name = grouped(held, file_being_loaded(), *self.told)
        return {
            name: location.tensor if isinstance(location, Held) else location
            for name, location in by_name.items()
        }

    def _name_formats(self, named: dict) -> None:
        """Tells an older host the formats of layers by their names in the model that is built,
        where it keeps formats by layer instead of reading them from the file."""
        layers = {
            name.removesuffix(".weight"): t.settings
            for name, t in named.items()
            if in_a_named_format(t)
        }
        if layers and not IN_FILE:
            self.layer_quant_config = layers
            self.manual_cast_dtype = self.manual_cast_dtype or self.unet_config["dtype"]

    def process_unet_state_dict_for_saving(self, state_dict, *arguments, **named):
        if self.custom_operations is not None:
            raise ValueError(
                "this MODEL keeps its weights in the form of another pack (GGUF), which cannot be saved; load it from .safetensors"
            )
        return super().process_unet_state_dict_for_saving(
            file_of(self.pruned, state_dict), *arguments, **named
        )

    def host_names(self, tensors: FileTensors, *arguments, **named) -> dict[str, torch.Tensor]:
        """The tensors by the names that this version of the host has for them."""
        return super().process_unet_state_dict(dict(tensors), *arguments, **named)

    def _empty_model(self, names: list[str]) -> nn.Module:
        """The host's transformer on the meta device, with torch's own layers: it shows which tensors
        the model has, and their shapes, even where the host's layers have no weights yet."""
        structure, texts = self.structure, Texts()
        inputs = inputs_of(structure, torch.float32)
        options = {**self.unet_config, "dtype": torch.float32, "device": "meta", "operations": nn}
        with exchanged_blocks(structure, names, texts, inputs):
            model = getattr(self.host.module, self.host.model)(**options)
        finish(model, structure, texts, inputs)
        return model


@cache
def config_classes(host: Host) -> tuple[type, ...]:
    """One class of ours for each of the host's own: "PPCLFlux" is made from "Flux"."""
    stock = [getattr(comfy.supported_models, name) for name in host.stock]
    return tuple(type(f"PPCL{own.__name__}", (PrunedConfig, own), {"host": host}) for own in stock)


def told_of_formats(config) -> tuple[dict | None, torch.dtype | None]:
    """(layer -> settings of its format, dtype of the matrices of a scaled fp8 file), as an older
    host took them out of the file; None, None where they are still in it."""
    if IN_FILE:
        return None, None
    layers = (config.layer_quant_config or {}).items()
    return {name.removeprefix(COMFYUI_PREFIX): said for name, said in layers}, config.scaled_fp8


def in_a_named_format(tensor) -> bool:
    """Whether it is a matrix whose settings name its format, as opposed to older scaled fp8."""
    return isinstance(tensor, Quantised) and tensor.settings is not None and tensor.old is None


def is_ours(host: Host, tensors: FileTensors) -> bool:
    """Whether these are a transformer of this architecture that the host cannot load by itself."""
    known = host.mark in tensors and not any(name.startswith("controlnet_") for name in tensors)
    return known and is_pruned(host, tensors)


@cache
def log_once(text: str) -> None:
    logging.warning(text)


def file_being_loaded() -> str:
    """Name of the file, for messages. The host hands on tensors alone, so the name is looked up in
    the variables of the host's loader further up the call stack."""
    frame = inspect.currentframe()
    while frame is not None:
        for name in PATHS_IN_LOADERS:
            if isinstance(path := frame.f_locals.get(name), str):
                return Path(path).name
        frame = frame.f_back
    return "a file"


def marks_in(host: Host, model: nn.Module) -> FileTensors:
    """The empty tensors by which the host's model keeps settings that no shape shows. Files may lack
    them."""
    return {name: torch.empty(0) for name in host.engine.marks if hasattr(model, name)}


def transformer_of(host: Host, state_dict: FileTensors) -> FileTensors:
    """The transformer's tensors in a checkpoint, without the checkpoint's prefix."""
    prefix = next(
        (name for name in state_dict if name.endswith(host.mark)), host.mark
    ).removesuffix(host.mark)
    return (
        {n.removeprefix(prefix): t for n, t in state_dict.items() if n.startswith(prefix)}
        if prefix
        else state_dict
    )
