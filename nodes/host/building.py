"""Pruned models as one more entry in the host's list of models: every loader of the host then reads
them.

The host's own classes are built; only its block constructors are exchanged while its model's
`__init__` runs.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import comfy.supported_models
import torch
from torch import nn

from ...ppcl_engine.models.layout import Place
from ...ppcl_engine.models.stored_layout import COMFYUI_PREFIX
from ...ppcl_engine.models.surgery import interval_streams
from ...ppcl_engine.plan import Interval
from ...ppcl_engine.system.float8 import FP8_MARK
from ...ppcl_engine.system.two_of_four import decompressed
from . import folded
from .adapters import part_of
from .base import BlockList, Host
from .blocks import Correction, Linear, Skip, Texts, add_correction, project
from .formats import grouped, passed_on
from .quantised import FORMAT, IN_FILE, Held, Quantised, expanded, refuse_unused_scales
from .saving import file_of
from .structure import FileTensors, Structure, is_pruned, is_surrounding, structure_of
from .switching import Parts

# what the host's loaders call the path of a model file
PATHS_IN_LOADERS = ("unet_path", "ckpt_path")
_building = threading.Lock()


class PrunedConfig:
    """Before one of the host's config classes: knows what the host does not load by itself, pruned
    files and models of other sizes."""

    host: Host

    @classmethod
    def matches(cls, unet_config, state_dict=None, *arguments, **named) -> bool:
        """The host asks this of every file that it loads: an error of ours is logged, and the next
        class is asked."""
        if state_dict is None or not super().matches(unet_config, None, *arguments, **named):
            return False
        try:
            return is_ours(cls.host, transformer_of(cls.host, state_dict))
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
        structure = self.structure = structure_of(self.host, tensors)
        self.unet_config |= self.host.arguments(structure.config)
        self._name_formats(self.host_names(structure.renamed(grouped)))
        given, texts = self.host_names(structure.renamed(tensors)), Texts()
        inputs = inputs_of(structure, self.manual_cast_dtype or self.unet_config.get("dtype"))
        with exchanged_blocks(structure, sorted(given), texts, inputs):
            model = super().get_model(state_dict, *arguments, **named)
        finish(model.diffusion_model, structure, texts, inputs)
        self.parts = model.diffusion_model.ppcl
        self.marks = marks_in(self.host, model.diffusion_model)
        if self.custom_operations is None:  # others make their tensors when they are loaded
            check_tensors(self._empty_model(sorted(given)), given | self.marks)
        return model

    def process_unet_state_dict(self, state_dict):
        named = (
            self.host_names(self.structure.renamed(self._grouped(decompressed(state_dict))))
            | self.marks
        )
        return {
            name: t for name, t in expanded(named) if IN_FILE or not name.endswith(f".{FORMAT}")
        }

    def _grouped(self, tensors: FileTensors) -> dict:
        """Matrices of few bits as one with their scales. Raises ValueError for those that this host
        does not read."""
        held = {name: Held(tensor) for name, tensor in tensors.items()}
        if self.custom_operations is not None:
            found = passed_on(held)
        else:
            found = grouped(held, file_being_loaded(), *self.told)
        return {
            name: place.tensor if isinstance(place, Held) else place
            for name, place in found.items()
        }

    def _name_formats(self, named: dict) -> None:
        """A host that knows formats by the names of layers gets them by those of the model that is
        built."""
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
            file_of(self.parts, state_dict), *arguments, **named
        )

    def host_names(self, tensors: FileTensors) -> dict[str, torch.Tensor]:
        """By the names in this version of the host, which may rename some of a file's."""
        return super().process_unet_state_dict(dict(tensors))

    def _empty_model(self, names: list[str]) -> nn.Module:
        """The host's transformer on the meta device, on torch's own layers: which tensors it has,
        and their shapes, in whatever form this host keeps weights, and before it has any."""
        structure, texts = self.structure, Texts()
        inputs = inputs_of(structure, torch.float32)
        options = {**self.unet_config, "dtype": torch.float32, "device": "meta", "operations": nn}
        with exchanged_blocks(structure, names, texts, inputs):
            model = getattr(self.host.module, self.host.model)(**options)
        finish(model, structure, texts, inputs)
        return model


@cache
def config_classes(host: Host) -> tuple[type, ...]:
    """Ours before each of the host's own: "PPCLFlux" of "Flux"."""
    stock = [getattr(comfy.supported_models, name) for name in host.stock]
    return tuple(type(f"PPCL{own.__name__}", (PrunedConfig, own), {"host": host}) for own in stock)


def told_of_formats(config) -> tuple[dict | None, torch.dtype | None]:
    """(layer -> settings, what a scaled fp8 file keeps matrices in), where the host took them out
    of the file."""
    if IN_FILE:
        return None, None
    layers = (config.layer_quant_config or {}).items()
    return {name.removeprefix(COMFYUI_PREFIX): said for name, said in layers}, config.scaled_fp8


def in_a_named_format(tensor) -> bool:
    return isinstance(tensor, Quantised) and tensor.settings is not None and tensor.old is None


def is_ours(host: Host, tensors: FileTensors) -> bool:
    """Whether it is a transformer, of this architecture, that the host can't load by itself."""
    known = host.mark in tensors and not any(name.startswith("controlnet_") for name in tensors)
    return known and is_pruned(host, tensors)


@cache
def log_once(text: str) -> None:
    logging.warning(text)


def file_being_loaded() -> str:
    """Its name, out of the host's loader that called us: what it hands on is tensors alone."""
    frame = inspect.currentframe()
    while frame is not None:
        for name in PATHS_IN_LOADERS:
            if isinstance(path := frame.f_locals.get(name), str):
                return Path(path).name
        frame = frame.f_back
    return "a file"


def marks_in(host: Host, model: nn.Module) -> FileTensors:
    """Empty tensors that the host's model holds for what no shape tells; not every file of ours has
    them."""
    return {name: torch.empty(0) for name in host.engine.marks if hasattr(model, name)}


def transformer_of(host: Host, state_dict: FileTensors) -> FileTensors:
    """The transformer's tensors of a checkpoint, by their own names."""
    prefix = next(
        (name for name in state_dict if name.endswith(host.mark)), host.mark
    ).removesuffix(host.mark)
    return (
        {n.removeprefix(prefix): t for n, t in state_dict.items() if n.startswith(prefix)}
        if prefix
        else state_dict
    )


def inputs_of(structure: Structure, dtype: torch.dtype):
    """Of folded modulations; None where nothing is folded. dtype: that the model computes in."""
    if structure.folding is None:
        return None
    return folded.inputs_of(structure.folding, structure.host.engine.width(structure.config), dtype)


def finish(transformer: nn.Module, structure: Structure, texts: Texts, inputs) -> None:
    if inputs is not None:
        host = structure.host
        folded.attach(
            transformer.get_submodule(host.engine.time_embedder),
            getattr(transformer, host.final),
            inputs,
        )
    transformer.register_forward_pre_hook(forget_texts)
    transformer.register_load_state_dict_post_hook(refuse_unused_scales)
    structure.host.watch(transformer, texts)
    transformer.ppcl = Parts(structure, texts, inputs)


def forget_texts(model: nn.Module, arguments) -> None:
    """Before each forward: what an earlier one left is not for this one."""
    model.ppcl.texts.clear()


@contextmanager
def exchanged_blocks(
    structure: Structure, names: list[str], texts: Texts, inputs
) -> Iterator[None]:
    """`build_block` stands for the host's block classes, once a block, in the order of each
    list."""
    module, built = structure.host.module, {}

    def constructor(blocks: BlockList, stock: type[nn.Module]):
        indices = iter(structure.host.ranges(structure.config)[blocks.name])

        def construct(*arguments, **named) -> nn.Module:
            index = next(indices)
            built[index] = build_block(
                structure, names, texts, inputs, built, index, partial(stock, *arguments, **named)
            )
            return built[index]

        return construct

    with _building:
        stock = {blocks.kind: getattr(module, blocks.kind) for blocks in structure.host.lists}
        try:
            for blocks in structure.host.lists:
                setattr(module, blocks.kind, constructor(blocks, stock[blocks.kind]))
            yield
        finally:
            for kind, own in stock.items():
                setattr(module, kind, own)


def build_block(
    structure: Structure,
    names: list[str],
    texts: Texts,
    inputs,
    built: dict[int, nn.Module],
    index: int,
    stock,
) -> nn.Module:
    """What stands at an index of the teacher. `inputs`: of folded modulations, by the whole
    model."""
    place = next((place for place in structure.layout.places if place.index == index), None)
    if place is None:
        return Skip(structure.host.list_of(structure.config, index))
    options = {name: stock.keywords.get(name) for name in ("dtype", "device")}
    linear: Linear = partial(stock.keywords["operations"].Linear, **options)
    make = partial(_new_block, stock, structure, inputs)
    block, width = make(), structure.host.engine.width(structure.config)
    if structure.switchable:
        return _with_all_parts(block, index, structure, names, texts, make, linear)
    if place.interval:
        _correct(block, place.interval, structure, texts, linear)
    _cut_maps(block, place, structure, linear)
    source = None if place.text_source is None else built[place.text_source]
    return project(
        structure.host, block, place, lambda kind, part: linear(width, width), texts, source
    )


def _new_block(stock, structure: Structure, inputs) -> nn.Module:
    """The host's own, or with folded modulations."""
    if structure.folding is None:
        return stock()
    inputs.new_linear = partial(
        stock.keywords["operations"].Linear, dtype=stock.keywords.get("dtype")
    )
    names, device = structure.host.engine.timestep_modulations, stock.keywords.get("device")
    return folded.fold_block(stock(), names, structure.folding, inputs, device)


def _with_all_parts(
    block: nn.Module, index: int, structure: Structure, names, texts: Texts, make, linear: Linear
) -> nn.Module:
    """The teacher's block, the student of the interval that starts here, and all projections of
    this place."""
    for interval in structure.plan.intervals:
        if interval.first == index:
            block.student = _correct(make(), interval, structure, texts, linear)
    width = structure.host.engine.width(structure.config)
    found: dict[str, dict[str, dict[str, nn.Module]]] = {}
    prefix = f"{structure.prefix(index)}projections."
    for name in names:
        if name.startswith(prefix) and name.endswith(".weight"):
            place, kind, part, _ = name.removeprefix(prefix).split(".")
            found.setdefault(place, {}).setdefault(kind, {})[part] = linear(width, width)
    if found:
        block.projections = _module_dict(found)
    return block


def _module_dict(tree: dict) -> nn.ModuleDict:
    return nn.ModuleDict(
        {name: _module_dict(t) if isinstance(t, dict) else t for name, t in tree.items()}
    )


def _correct(
    block: nn.Module, interval: Interval, structure: Structure, texts: Texts, linear: Linear
) -> nn.Module:
    if interval.correction == "none":
        return block
    host, config = structure.host, structure.config
    rank = None if interval.correction == "affine" else int(interval.correction)
    streams = interval_streams(host.engine, config, interval)
    correction = Correction.empty(host.engine.width(config), streams, rank, linear)
    return add_correction(block, correction, host.list_of(config, interval.first).gives, texts)


def _cut_maps(block: nn.Module, place: Place, structure: Structure, linear: Linear) -> None:
    """To what the place's projections leave of them."""
    for site in place.ffn:
        for name, cut in structure.host.cuts_at(structure.config, site).items():
            parent, _, child = name.rpartition(".")
            owner, whole = block.get_submodule(parent), block.get_submodule(name)
            if structure.folding:
                setattr(owner, child, folded.cut(whole, structure.folding))
                continue
            width_out, width_in = cut.shape((whole.out_features, whole.in_features))
            new = partial(part_of(linear.func, cut), **linear.keywords)
            setattr(owner, child, new(width_in, width_out, bias=has_bias(whole)))


def has_bias(linear: nn.Module) -> bool:
    """Hosts that move weights when they are used build a map without tensors, and note what it is
    to get."""
    return linear.bias is not None or getattr(linear, "comfy_need_lazy_init_bias", False)


def check_tensors(model: nn.Module, tensors: FileTensors) -> None:
    """Raises ValueError, in one line, for a tensor that is missing, has no home, or is of another
    shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in tensors.items() if name != FP8_MARK}
    if missing := sorted(expected.keys() - given.keys()):
        raise ValueError(
            f"the file lacks {len(missing)} tensors, first {missing[0]}; copy or download it again"
        )
    marks = model.ppcl.structure.host.engine.marks
    if unknown := sorted(
        n for n in given.keys() - expected.keys() if not is_surrounding(n) and n not in marks
    ):
        raise ValueError(
            f"the file has {len(unknown)} tensors with no home, first {unknown[0]}; is it another model?"
        )
    for name, shape in expected.items():
        if given[name] != shape:
            raise ValueError(
                f"the file's {name} is of shape {given[name]}, not {shape}; is it another model's?"
            )
