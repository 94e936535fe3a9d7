"""Builds the host's model of a pruned structure: what stands at each of the teacher's numbers.

ComfyUI's own classes are built; only its block constructors are exchanged while its model's
`__init__` runs. Where a block was dropped a `Skip` stands, so that every other block keeps the
teacher's number: names in a LoRA and the depth of a ControlNet stay right by themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from ...ppcl_engine.models.layout import Place
from ...ppcl_engine.models.surgery import interval_streams
from ...ppcl_engine.plan import Interval
from ...ppcl_engine.system.float8 import FP8_MARK
from . import folded
from .adapters import part_of
from .base import BlockList
from .blocks import Correction, Linear, Texts, add_correction, project
from .quantised import refuse_unused_scales
from .skipped_blocks import Skip
from .structure import FileTensors, Structure, is_surrounding
from .switching import PrunedState

_building = threading.Lock()
"""the host's module is changed while a model is built: one model at a time"""


def inputs_of(structure: Structure, dtype: torch.dtype):
    """What the folded modulations read; None where nothing is folded. dtype: of the model's
    computations."""
    if structure.folding is None:
        return None
    return folded.inputs_of(structure.folding, structure.host.engine.width(structure.config), dtype)


def finish(transformer: nn.Module, structure: Structure, texts: Texts, inputs) -> None:
    """Attaches to a built transformer what its blocks share; from then on it has `ppcl`."""
    if inputs is not None:
        host = structure.host
        folded.attach(
            transformer.get_submodule(host.engine.time_embedder),
            getattr(transformer, host.final),
            inputs,
        )
    for name in structure.host.unread:
        if hasattr(transformer, name):
            delattr(transformer, name)
    transformer.register_forward_pre_hook(forget_texts)
    transformer.register_load_state_dict_post_hook(refuse_unused_scales)
    structure.host.count_text_tokens(transformer, texts)
    transformer.ppcl = PrunedState(structure, texts, inputs)


def forget_texts(model: nn.Module, arguments) -> None:
    """Runs before each forward: texts left by an earlier one must not reach this one."""
    model.ppcl.texts.clear()


@contextmanager
def exchanged_blocks(
    structure: Structure, names: list[str], texts: Texts, inputs
) -> Iterator[None]:
    """Meanwhile `build_block` is called in place of the host's block classes: once for each block,
    in the order of each list."""
    module, built = structure.host.module, {}

    def constructor(blocks: BlockList, stock: type[nn.Module]):
        indices = iter(structure.host.ranges(structure.config)[blocks.name])
        others = iter(range(structure.host.built_before(structure.config, blocks)))

        def construct(*arguments, **named) -> nn.Module:
            if next(others, None) is not None:
                return stock(*arguments, **named)
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
    """The module that stands at an index of the teacher. names: of the tensors that are given;
    built: the blocks so far, by index; inputs: what folded modulations read, shared by the whole
    model; stock: makes the host's own block."""
    place = next((place for place in structure.layout.places if place.index == index), None)
    if place is None:
        return Skip(structure.host.list_of(structure.config, index))
    given = structure.host.list_of(structure.config, index).built_with(stock.keywords)
    options = {name: given.get(name) for name in ("dtype", "device")}
    linear: Linear = partial(given["operations"].Linear, **options)
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
    """The host's own block, its modulations folded where the structure says so."""
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
    """For a switchable model: the teacher's block, holding the student of the interval that starts
    here and all projections of this place."""
    for interval in structure.plan.intervals:
        if interval.first == index:
            block.student = _correct(make(), interval, structure, texts, linear)
    width = structure.host.engine.width(structure.config)
    projections: dict[str, dict[str, dict[str, nn.Module]]] = {}
    prefix = f"{structure.prefix(index)}projections."
    for name in names:
        if name.startswith(prefix) and name.endswith(".weight"):
            place, kind, part, _ = name.removeprefix(prefix).split(".")
            projections.setdefault(place, {}).setdefault(kind, {})[part] = linear(width, width)
    if projections:
        block.projections = _module_dict(projections)
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
    """Replaces maps of the block by what the place's projections leave of them."""
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
    """A host that moves weights when they are used first builds a map without tensors, and only
    notes which it will get."""
    return linear.bias is not None or getattr(linear, "comfy_need_lazy_init_bias", False)


def check_tensors(model: nn.Module, tensors: FileTensors) -> None:
    """Raises ValueError, in one line, for a tensor that is missing, that the model does not use, or
    that has another shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in tensors.items() if name != FP8_MARK}
    if missing := sorted(expected.keys() - given.keys()):
        raise ValueError(
            f"the file lacks {len(missing)} tensors, first {missing[0]}; copy or download it again"
        )
    marks = model.ppcl.structure.host.engine.marks
    if unknown := sorted(
        n
        for n in given.keys() - expected.keys()
        if not is_surrounding(n)
        and n not in marks
        and n.partition(".")[0] not in model.ppcl.structure.host.unread
    ):
        raise ValueError(
            f"the file has {len(unknown)} tensors that this model does not use, first {unknown[0]}; is it another model's?"
        )
    for name, shape in expected.items():
        if given[name] != shape:
            raise ValueError(
                f"the file's {name} is of shape {given[name]}, not {shape}; is it another model's?"
            )
