"""Whether this ComfyUI has what the pack builds on. Asked before anything of it is changed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import comfy.float
import comfy.ldm.common_dit
import comfy.lora
import comfy.lora_convert
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.quant_ops
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils

from .base import Host

_BASE, _PATCHER = comfy.supported_models_base.BASE, comfy.model_patcher.ModelPatcher
USED = (  # (owner, what the pack calls or overrides, parameters that it passes or takes by name)
    (comfy.sd, "load_diffusion_model_state_dict", ("sd", "model_options")),
    (_BASE, "matches", ("unet_config", "state_dict")),
    (_BASE, "get_model", ("state_dict", "prefix", "device")),
    (_BASE, "process_unet_state_dict", ("state_dict",)),
    (_BASE, "process_unet_state_dict_for_saving", ("state_dict",)),
    (_BASE, "set_inference_dtype", ("dtype", "manual_cast_dtype")),
    (_PATCHER, "clone", ()),
    (_PATCHER, "add_object_patch", ("name", "obj")),
    (_PATCHER, "add_wrapper_with_key", ("wrapper_type", "key", "wrapper")),
    (_PATCHER, "add_callback_with_key", ("call_type", "key", "callback")),
    (_PATCHER, "set_attachments", ("key", "attachment")),
    (_PATCHER, "get_model_object", ("name",)),
    (comfy.ops, "cast_bias_weight", ("input", "offloadable")),
    (comfy.ops, "uncast_bias_weight", ("weight", "bias", "offload_stream")),
    (comfy.ops, "disable_weight_init", ()),
    (comfy.ops, "mixed_precision_ops", ()),
    (comfy.quant_ops, "QUANT_ALGOS", ()),
    (comfy.quant_ops, "QuantizedTensor", ()),
    (comfy.float, "stochastic_rounding", ("seed",)),
    (comfy.ldm.common_dit, "pad_to_patch_size", ()),
    (comfy.lora, "load_lora", ("log_missing",)),
    (comfy.lora, "model_lora_keys_unet", ()),
    (comfy.lora_convert, "convert_lora", ()),
    (comfy.model_management, "current_loaded_models", ()),
    (comfy.model_management, "get_torch_device", ()),
    (comfy.model_management, "get_torch_device_name", ()),
    (comfy.model_management, "throw_exception_if_processing_interrupted", ()),
    (comfy.utils, "ProgressBar", ()),
    (comfy.utils, "load_torch_file", ("safe_load",)),
)
WRAPPERS = ("PREPARE_SAMPLING", "OUTER_SAMPLE", "SAMPLER_SAMPLE", "PREDICT_NOISE", "APPLY_MODEL")
CALLBACKS = ("ON_LOAD", "ON_CLONE")
BUILT_WITH = ("dtype", "device", "operations")  # how the host's models and blocks are constructed


def differences(hosts: tuple[Host, ...]) -> Iterator[str]:
    """Everything that is not as the pack expects it, in words."""
    if not isinstance(getattr(comfy.supported_models, "models", None), list):
        yield "comfy.supported_models has no list of models"
    for owner, name, parameters in USED:
        yield from _different(owner, name, parameters)
    for wrapper in WRAPPERS:
        yield from _different(comfy.patcher_extension.WrappersMP, wrapper)
    for callback in CALLBACKS:
        yield from _different(comfy.patcher_extension.CallbacksMP, callback)
    for host in hosts:
        for name in host.stock:
            yield from _different(comfy.supported_models, name)
        yield from _different(host.module, host.model, BUILT_WITH)
        for blocks in host.lists:
            wanted = (blocks.settings,) if blocks.settings else BUILT_WITH
            yield from _different(host.module, blocks.kind, wanted)


def _different(owner, name: str, parameters: tuple[str, ...] = ()) -> Iterator[str]:
    where = (
        f"{getattr(owner, '__module__', '')}.{owner.__name__}".lstrip(".")
        if inspect.isclass(owner)
        else owner.__name__
    )
    member = getattr(owner, name, None)
    if member is None:
        yield f"{where} has no {name}"
        return
    if not parameters:
        return
    known = inspect.signature(member).parameters.values()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known)
    lacking = [name for name in parameters if name not in {parameter.name for parameter in known}]
    if lacking and not takes_any:
        yield f"{where}.{name} takes no {lacking[0]}"
