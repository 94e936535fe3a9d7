"""PPCL_LoadModel: loads a bundle with its base model, a standalone file, or a released pruned model."""

from __future__ import annotations

import inspect
from pathlib import Path

import comfy.sd
import torch
from comfy_api.v0_0_2 import io

from ...ppcl_engine.algorithms.sparsity.files import sparsity_of
from ...ppcl_engine.models.layout import layout_of
from ...ppcl_engine.settings.convert_settings import ImportConfig
from ...ppcl_engine.settings.help_texts import setting_help
from ...ppcl_engine.system.numbers import bytes_text, count_text
from ...ppcl_engine.system.tensor_files import TensorFile
from ..host.adapters import prepare
from ..host.modulations import FOLDS, OFF
from ..host.structure import hidden
from ..host.switching import size_of, variant_of, with_variant
from ..loading import content_of, gguf
from ..loading.bundles import variant_names
from ..loading.fold_on_load import make_fold
from ..loading.request import AUTO, PRESETS, Content, Request
from ..node import Node
from ..paths import GGUF, NO_BASE, base_path, model_files, model_path
from ..sampling.modulation_tables import follow
from ..sampling.step_timer import watch

FOLD_HELP = (
    "A third less memory, same speed. table: the very same pictures; a schedule that is new costs one pass over the file, "
    "once. basis: any schedule and sampler at once, changed less than the eye sees."
)
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
    watch(model)
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
    parts = getattr(model.model.diffusion_model, "ppcl", None)
    if parts is not None and parts.structure.folding is not None:
        parts.later = content.later
        follow(model)


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
    """What a branch runs, such as "small: 11.93 B parameters, 23.90 GB in use; switchable"."""
    transformer = model.model.diffusion_model
    parts = getattr(transformer, "ppcl", None)
    if parts is not None and parts.structure.switchable:
        variant = variant_of(model)
        parameters, size = size_of(transformer, layout_of(parts.plan, variant))
        return f"{variant.name}: {count_text(parameters)} parameters, {bytes_text(size)} in use; switchable"
    parameters, size = size_of(transformer, None)
    return f"{count_text(parameters)} parameters, {bytes_text(size)}"


class LoadModel(Node):
    FILES = {"file": model_path, "base": base_path}
    LOOKED_UP = ("variant",)

    @classmethod
    def define_schema(cls) -> io.Schema:
        bases = list(model_files())
        files = gguf.files_last(bases)
        return io.Schema(
            node_id="PPCL_LoadModel",
            display_name="Load Pruned Model (PPCL)",
            category="PPCL",
            description="A PPCL bundle with its base model, a pruned model in one file, or a released pruned folder.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=files,
                    tooltip="Bundle (*.ppcl.safetensors), standalone or released model.",
                ),
                io.Combo.Input(
                    "base",
                    options=[NO_BASE, *bases],
                    tooltip="Of a bundle: the full model it was made from.",
                ),
                io.Combo.Input(
                    "variant",
                    options=variant_names(),
                    tooltip="Of a bundle: the size to start with.",
                ),
                io.Boolean.Input(
                    "switchable",
                    default=True,
                    tooltip="On: all sizes are loaded once and switched in no time. Off: this one alone.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    tooltip="As in Load Diffusion Model.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default=AUTO,
                    tooltip="Of a released model: which blocks of the original its blocks are (LoRA, ControlNet).",
                ),
                io.String.Input(
                    "intervals",
                    default="",
                    tooltip=f'For "by intervals": {setting_help(ImportConfig, "intervals")}',
                ),
                io.Boolean.Input(
                    "legacy_text",
                    default=False,
                    tooltip=setting_help(ImportConfig, "legacy_txt_proj"),
                ),
                io.Combo.Input(
                    "fold", options=list(FOLDS), default=OFF, optional=True, tooltip=FOLD_HELP
                ),
            ],
            outputs=[io.Model.Output(), io.String.Output(display_name="text")],
        )

    @classmethod
    def perform(
        cls, file, base, variant, switchable, weight_dtype, preset, intervals, legacy_text, fold=OFF
    ) -> io.NodeOutput:
        request = Request(
            path=model_path(file),
            base=base_path(base),
            variant=variant,
            fold=fold,
            switchable=switchable,
            preset=preset,
            intervals=intervals,
            legacy_text=legacy_text,
        )
        return io.NodeOutput(*load_patcher(request, weight_dtype))
