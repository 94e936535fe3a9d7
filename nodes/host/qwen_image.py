"""Pruned Qwen-Image models as one more entry in the host's list of models: every loader of the host then reads them.

The host's own classes are built; only its block constructor is exchanged while its model's `__init__` runs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import comfy.ldm.qwen_image.model as host_module
import comfy.supported_models
import torch
from torch import nn

from ...ppcl_engine.architectures.folded import Folding
from ...ppcl_engine.layout import Place
from ...ppcl_engine.plan import Interval
from ...ppcl_engine.sparsity.compressed import decompressed
from ...ppcl_engine.surgery import PassThrough, add_correction, interval_streams
from . import folded
from .adapters import half_of
from .blocks import RETURNS, STREAMS, Correction, Linear, Texts, project
from .parts import Parts
from .structure import BLOCK, QWEN, FileTensors, Structure, is_pruned, is_surrounding, sizes_of, structure_of

BLOCK_CLASS = "QwenImageTransformerBlock"
QUANTIZATION_SUFFIXES = (".scale_weight", ".weight_scale", ".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
_building = threading.Lock()


class PPCLQwenImage(comfy.supported_models.QwenImage):
    """Knows what the host does not load by itself: pruned files, and models of other sizes."""

    @classmethod
    def matches(cls, unet_config, state_dict=None) -> bool:
        if not super().matches(unet_config) or state_dict is None:
            return False
        tensors = transformer_of(state_dict)
        return not any(name.startswith("controlnet_") for name in tensors) and is_pruned(tensors)

    def get_model(self, state_dict, prefix="", device=None):
        tensors = decompressed(transformer_of(state_dict), shapes_only=True)
        structure = self.structure = structure_of(tensors)
        self.unet_config |= {**sizes_of(tensors), "num_layers": structure.layout.num_blocks}
        named, texts = structure.renamed(tensors), Texts()
        inputs = inputs_of(structure, tensors, self.manual_cast_dtype or self.unet_config.get("dtype"))
        with exchanged_block(partial(build_block, structure, sorted(named), texts, inputs)):
            model = super().get_model(state_dict, prefix, device)
        if inputs is not None:
            folded.attach(model.diffusion_model, inputs)
        model.diffusion_model.register_forward_pre_hook(forget_texts)
        model.diffusion_model.ppcl = Parts(structure, texts)
        if self.custom_operations is None:  # others make their tensors when they are loaded
            check_tensors(model.diffusion_model, named)
        return model

    def process_unet_state_dict(self, state_dict):
        return self.structure.renamed(decompressed(state_dict))


def register() -> None:
    """First in the host's list; by name, so that loading this pack again does not double it."""
    models = comfy.supported_models.models
    models[:] = [PPCLQwenImage, *(m for m in models if m.__name__ != PPCLQwenImage.__name__)]


def inputs_of(structure: Structure, tensors: FileTensors, dtype: torch.dtype):
    """Of folded modulations; None where nothing is folded. dtype: that the model computes in."""
    if structure.folding is None:
        return None
    return folded.inputs_of(structure.folding, tensors["img_in.weight"].shape[0], dtype)


def transformer_of(state_dict: FileTensors) -> FileTensors:
    """The transformer's tensors of a checkpoint, by their own names."""
    prefix = next(name for name in state_dict if name.endswith("txt_norm.weight")).removesuffix("txt_norm.weight")
    return {n.removeprefix(prefix): t for n, t in state_dict.items() if n.startswith(prefix)} if prefix else state_dict


def forget_texts(model: nn.Module, arguments) -> None:
    """Before each forward: what an earlier one left is not for this one."""
    model.ppcl.texts.clear()


@contextmanager
def exchanged_block(build) -> Iterator[None]:
    """`build(index, stock)` stands for the host's block class, once a block, in their order."""
    with _building:
        stock = getattr(host_module, BLOCK_CLASS)
        built: list[nn.Module] = []

        def construct(*arguments, **named) -> nn.Module:
            built.append(build(built, partial(stock, *arguments, **named)))
            return built[-1]

        setattr(host_module, BLOCK_CLASS, construct)
        try:
            yield
        finally:
            setattr(host_module, BLOCK_CLASS, stock)


def build_block(
    structure: Structure, names: list[str], texts: Texts, inputs, built: list[nn.Module], stock
) -> nn.Module:
    """What stands at the next index of the host's list. `inputs`: of folded modulations, by the whole model."""
    index = len(built)
    place = next((place for place in structure.layout.places if place.index == index), None)
    if place is None:
        return PassThrough(QWEN.block_arguments, QWEN.block_returns)
    options = {name: stock.keywords.get(name) for name in ("dtype", "device")}
    linear: Linear = partial(stock.keywords["operations"].Linear, **options)
    make = partial(_new_block, stock, structure, inputs)
    block = make()
    if structure.switchable:
        return _with_all_parts(block, index, structure, names, make, linear)
    if place.interval:
        _correct(block, place.interval, structure, linear)
    _cut_modulations(block, place, partial(half_of(linear.func), **options), structure.folding)
    source = None if place.text_source is None else built[place.text_source]
    return project(block, place, lambda kind, part: linear(block.dim, block.dim), texts, source)


def _new_block(stock, structure: Structure, inputs) -> nn.Module:
    """The host's own, or with folded modulations."""
    if structure.folding is None:
        return stock()
    inputs.new_linear = partial(stock.keywords["operations"].Linear, dtype=stock.keywords.get("dtype"))
    return folded.fold_block(stock(), structure.folding, inputs, stock.keywords.get("device"))


def _with_all_parts(block: nn.Module, index: int, structure: Structure, names, make, linear: Linear) -> nn.Module:
    """The teacher's block, the student of the interval that starts here, and all projections of this place."""
    for interval in structure.plan.intervals:
        if interval.first == index:
            block.student = _correct(make(), interval, structure, linear)
    found: dict[str, dict[str, dict[str, nn.Module]]] = {}
    for name in names:
        number, rest = match.groups() if (match := BLOCK.match(name)) else (None, "")
        if number == str(index) and rest.startswith("projections.") and rest.endswith(".weight"):
            _, place, kind, part, _ = rest.split(".")
            found.setdefault(place, {}).setdefault(kind, {})[part] = linear(block.dim, block.dim)
    if found:
        block.projections = _module_dict(found)
    return block


def _module_dict(tree: dict) -> nn.ModuleDict:
    return nn.ModuleDict({name: _module_dict(t) if isinstance(t, dict) else t for name, t in tree.items()})


def _correct(block: nn.Module, interval: Interval, structure: Structure, linear: Linear) -> nn.Module:
    if interval.correction == "none":
        return block
    rank = None if interval.correction == "affine" else int(interval.correction)
    streams = interval_streams(QWEN, structure.plan.config, interval)
    return add_correction(block, Correction.empty(block.dim, streams, rank, linear), RETURNS)


def _cut_modulations(block: nn.Module, place: Place, linear: Linear, folding: Folding | None) -> None:
    """To the half that the paper's form of an FFN leaves."""
    for site in place.ffn:
        if site.form == "paper":
            name = f"{STREAMS[site.kind.removeprefix('ffn_')]}_mod"
            whole = getattr(block, name)
            half = folded.cut(whole, folding) if folding else nn.Sequential(whole[0], linear(block.dim, 3 * block.dim))
            setattr(block, name, half)


def check_tensors(model: nn.Module, tensors: FileTensors) -> None:
    """Raises ValueError, in one line, for a tensor that is missing, has no home, or is of another shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in tensors.items() if not name.endswith(QUANTIZATION_SUFFIXES)}
    expected = {name: shape for name, shape in expected.items() if not name.endswith(QUANTIZATION_SUFFIXES)}
    if missing := sorted(expected.keys() - given.keys()):
        raise ValueError(f"the file lacks {len(missing)} tensors, first {missing[0]}; copy or download it again")
    if unknown := sorted(n for n in given.keys() - expected.keys() if not is_surrounding(n) and n not in QWEN.marks):
        raise ValueError(f"the file has {len(unknown)} tensors with no home, first {unknown[0]}; is it another model?")
    for name, shape in expected.items():
        if given[name] != shape:
            raise ValueError(f"the file's {name} is of shape {given[name]}, not {shape}; is it another model's?")


def empty_host_model(tensors: FileTensors, operations, dtype: torch.dtype) -> nn.Module:
    """The host's transformer on the meta device, for counting (a file's tensors may be on it too)."""
    structure = structure_of(tensors)
    sizes = {**sizes_of(tensors), "num_layers": structure.layout.num_blocks}
    inputs = inputs_of(structure, tensors, dtype)
    with exchanged_block(partial(build_block, structure, sorted(structure.renamed(tensors)), Texts(), inputs)):
        model = host_module.QwenImageTransformer2DModel(**sizes, dtype=dtype, device="meta", operations=operations)
    if inputs is not None:
        folded.attach(model, inputs)
    return model
