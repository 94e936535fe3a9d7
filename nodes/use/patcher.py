"""Loads what a loader node is asked for as a MODEL, the host's patcher, and says what it holds."""

from __future__ import annotations

import inspect
from pathlib import Path

import comfy.sd
import torch

from ...ppcl_engine.algorithms.sparsity.files import sparsity_of
from ...ppcl_engine.models.layout import layout_of
from ...ppcl_engine.system.numbers import bytes_text, count_text
from ...ppcl_engine.system.tensor_files import TensorFile
from ..host.adapters import prepare
from ..host.structure import hidden
from ..host.switching import size_of, variant_of, with_variant
from ..loading import content_of, gguf
from ..loading.fold_on_load import make_fold
from ..loading.request import Content, Request
from ..paths import GGUF
from ..sampling.modulation_tables import fill_before_sampling
from ..sampling.step_timer import time_steps

WEIGHT_DTYPES = {
    "default": {},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "fp32": {"dtype": torch.float32},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}


def load_patcher(request: Request, weight_dtype: str = "default", disable_dynamic: bool = False):
    """(the host's patcher, what it holds in words). disable_dynamic: for hosts that move weights when
    they are used; passed on to their loader."""
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"weight dtype {weight_dtype!r} is unknown; known: {', '.join(WEIGHT_DTYPES)}"
        )
    quantised = gguf.is_needed(request, weight_dtype)
    content = (
        content_of(request, gguf.open_base)
        if quantised
        else content_of(request, make_fold=make_fold)
    )
    options = gguf.model_options() if quantised else dict(WEIGHT_DTYPES[weight_dtype])
    plan, variant = content.plan, content.variant
    content.tensors = hidden(content.tensors)  # the host empties it while it loads
    host_loads = comfy.sd.load_diffusion_model_state_dict
    newer = {"metadata": content.metadata, "disable_dynamic": disable_dynamic}
    known = {
        name: newer[name] for name in newer.keys() & inspect.signature(host_loads).parameters.keys()
    }
    model = host_loads(content.tensors, model_options=options, **known)
    if model is None:
        raise ValueError(
            f"{request.path.name}: ComfyUI does not know a model with these tensors; is the file complete?"
        )
    model = gguf.patched(model) if quantised else model
    model.cached_patcher_init = (_patcher_alone, (request, weight_dtype))
    time_steps(model)
    follow_folded(model, content)
    content.notes += note_sparsity(model, request.path)
    if plan and request.switchable and variant:
        prepare(model)
        model = with_variant(model, variant)
        content.notes += layout_of(plan, variant).notes
    lines = [described(model), f"read {bytes_text(content.bytes_read)}", *content.notes]
    return model, "\n".join(lines)


def follow_folded(model, content: Content) -> None:
    """Makes a folded model check its patches, and fill its table, when sampling starts."""
    pruned = getattr(model.model.diffusion_model, "ppcl", None)
    if pruned is not None and pruned.structure.folding is not None:
        pruned.later = content.later
        fill_before_sampling(model)


def note_sparsity(model, path: Path) -> tuple[str, ...]:
    """How many weights of a sparsified file are zero, in words, for the loader's text; the share is
    kept for Compare Variants."""
    sparsity = (
        sparsity_of(TensorFile(path).metadata) if path.is_file() and path.suffix != GGUF else None
    )
    if sparsity is None:
        return ()
    share = f"{100 * sparsity.dropped / sparsity.weights:.3g} %"
    model.model.ppcl_sparsity = f"{share} zero"
    return (f"{share} of {sparsity.weights:,} weights in its blocks are zero ({sparsity.pattern})",)


# newer hosts call this to load the model again, for another GPU or without dynamic memory
def _patcher_alone(request: Request, weight_dtype: str, disable_dynamic: bool = False):
    return load_patcher(request, weight_dtype, disable_dynamic)[0]


def described(model) -> str:
    """Says what a branch runs, such as "small: 11.93 B parameters, 23.90 GB in use; switchable"."""
    transformer = model.model.diffusion_model
    pruned = getattr(transformer, "ppcl", None)
    if pruned is not None and pruned.structure.switchable:
        variant = variant_of(model)
        parameters, size = size_of(transformer, layout_of(pruned.plan, variant))
        return f"{variant.name}: {count_text(parameters)} parameters, {bytes_text(size)} in use; switchable"
    parameters, size = size_of(transformer, None)
    return f"{count_text(parameters)} parameters, {bytes_text(size)}"
