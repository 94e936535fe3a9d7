"""Our SD3.5 tensors in ComfyUI's layout, in ComfyUI's own class: every name is taken, and the
velocity is diffusers'."""

from __future__ import annotations

import comfy.model_detection
import comfy.ops
import comfy.utils
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from diffusers import SD3Transformer2DModel

from ppcl_engine.architectures import architecture_named
from ppcl_engine.models.tensor_sources import Source, comfyui_sources

from ..forwards import relative_error

SD35 = architecture_named("sd35")
HOST = {
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "num_layers": 4,
    "caption_projection_dim": 256,
}  # depth = heads


@pytest.fixture(scope="module", params=[[], [0, 1]], ids=["large", "medium"])
def config(request):
    return {**SD35.tiny_config, **HOST, "dual_attention_layers": request.param}


@pytest.fixture(scope="module")
def model(config):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = SD3Transformer2DModel(**config).eval().requires_grad_(False)
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(
                noise / parameter.shape[1] ** 0.5
                if parameter.ndim == 2
                else parameter + 0.1 * noise
            )
    return model


@pytest.fixture(scope="module")
def stored(model):
    sources = {
        name: Source(tuple(t.shape), lambda t=t: t) for name, t in model.state_dict().items()
    }
    return {name: source.read() for name, source in comfyui_sources(SD35, sources).items()}


def test_the_hosts_class_computes_diffusers_velocity(config, model, stored):
    detected = comfy.model_detection.detect_unet_config(stored, "")
    assert (
        detected["depth"] == 4
        and detected["x_block_self_attn_layers"] == config["dual_attention_layers"]
    )
    options = {"device": "cpu", "dtype": torch.float32, "operations": comfy.ops.disable_weight_init}
    host = OpenAISignatureMMDITWrapper(**detected, **options).eval()
    host.load_state_dict(stored)
    inputs = SD35.random_inputs(config, 2, (1, 4, 6), 7, "cpu")
    latents = SD35.unpack(inputs["hidden_states"], inputs["grid"])
    with torch.no_grad():
        theirs = host(
            latents,
            1000 * inputs["timestep"],
            inputs["encoder_hidden_states"],
            inputs["pooled_projections"],
        )
        ours = SD35.unpack(SD35.call(model, inputs), inputs["grid"])
    assert relative_error(theirs, ours) < 1e-5


def test_names_are_the_hosts_own(model, stored):
    """By which it places LoRA files: the same tensors, and the same ones with their halves
    exchanged."""
    theirs = comfy.utils.mmdit_to_diffusers(comfy.model_detection.detect_unet_config(stored, ""))
    keys = set(model.state_dict())
    assert keys <= theirs.keys()
    for key in keys:
        name, *how = theirs[key] if isinstance(theirs[key], tuple) else (theirs[key],)
        part = SD35.to_comfyui(key, keys)
        assert part.name == name and (part.pieces == (1, 0)) == (len(how) == 2)
