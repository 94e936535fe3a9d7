"""The host's own nodes on pruned models give what they give on the host's full-depth model with
student weights at u and the blocks behind it skipped, or, where width is pruned, what the engine
gives with the LoRA in its weights; with an edit model's references too."""

from functools import cache

import comfy.controlnet
import comfy.hooks
import comfy.latent_formats
import comfy.ops
import pytest
import torch
from comfy.ldm.qwen_image.controlnet import QwenImageControlNetModel
from safetensors.torch import load_file

from ppcl_engine.models.opening import open_model
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ..cases import edits
from ..controlled import controlled
from ..forwards import relative_error
from .adapted import engine_with, full_depth_reference

TOLERANCE = 1e-4
WIDTH, BLOCKS, RANK = 32, 6, 3
BIG = {"strength_model": 1.0, "lora_name": "random.safetensors"}
DEPTH = ["3-4", "1-2", "small"]
EVERY = ["full", *DEPTH, "1-2,text:3-4", "smallest"]


@pytest.fixture(scope="module")
def lora(models, teacher) -> dict[str, torch.Tensor]:
    """A change for every matrix of every block; returned by the names of the weights."""
    generator, changes, stored = torch.Generator().manual_seed(2), {}, {}
    file = TensorFile(teacher)
    for key in file.keys():
        if key.startswith("transformer_blocks.") and len(file.shape(key)) == 2:
            out, into = file.shape(key)
            down, up = (
                torch.randn(RANK, into, generator=generator),
                torch.randn(out, RANK, generator=generator),
            )
            up *= 0.3 / into**0.5
            name = key.removesuffix(".weight")
            stored |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
            changes[key] = up @ down
    write_tensors(models.loras / "random.safetensors", stored)
    return changes


@pytest.fixture(scope="module")
def reference(load, bundle, teacher, models, architecture):
    """variant -> the host's full-depth model that it has to match"""
    make = full_depth_reference(
        load, bundle, teacher, models, architecture, lambda index: ("double_block", index)
    )
    return cache(lambda name: make(["1-2", "3-4"] if name == "small" else [name]))


@pytest.fixture(scope="module")
def control(run_node, inputs):
    """Conditioning with a ControlNet: the host's InstantX class built small (width 32, 2 blocks),
    random."""
    torch.manual_seed(3)
    sizes = {
        "in_channels": 64,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 24,
    }
    network = QwenImageControlNetModel(
        **sizes,
        num_layers=2,
        axes_dims_rope=(2, 6, 8),
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    network.main_model_double = BLOCKS

    net = comfy.controlnet.ControlNet(
        network,
        compression_ratio=1,
        latent_format=comfy.latent_formats.Wan21(),
        load_device=torch.device("cpu"),
    )
    return controlled(run_node, inputs, net)


@edits
@pytest.mark.parametrize("variant", DEPTH)
def test_lora_as_on_the_full_model(whole, switched, run_node, velocity, reference, lora, variant):
    (expected,) = run_node("LoraLoaderModelOnly", model=reference(variant), **BIG)
    (ours,) = run_node("LoraLoaderModelOnly", model=switched(whole, variant=variant), **BIG)
    actual = velocity(ours)
    assert relative_error(actual, velocity(expected)) < 1e-5
    assert relative_error(actual, velocity(switched(whole, variant=variant))) > 0.05


@pytest.mark.parametrize("variant", DEPTH)
def test_lora_as_a_hook(whole, switched, run_node, velocity, lora, models, inputs, variant):
    """On a conditioning instead of the model: the same, and gone behind it."""
    model = switched(whole, variant=variant)
    (patched,) = run_node("LoraLoaderModelOnly", model=model, **BIG)
    expected, plain = velocity(patched), velocity(model)
    hooks = comfy.hooks.create_hook_lora(load_file(models.loras / BIG["lora_name"]), 1.0, 0.0)
    positive = comfy.hooks.set_hooks_for_conditioning([[inputs.text, {}]], hooks)
    assert relative_error(velocity(model, positive=positive), expected) < 1e-5
    assert torch.equal(velocity(model), plain)


@edits
@pytest.mark.parametrize("variant", EVERY)
def test_lora_on_every_kind_of_variant(
    load, whole, switched, run_node, velocity, lora, bundle, teacher, architecture, inputs, variant
):
    """Before the switch, behind it, and on the variant loaded alone: the same, and the engine's."""
    (first,) = run_node("LoraLoaderModelOnly", model=whole, **BIG)
    (last,) = run_node("LoraLoaderModelOnly", model=switched(whole, variant=variant), **BIG)
    alone = load(bundle.name, base=teacher.name, variant=variant, switchable=False)
    (alone,) = run_node("LoraLoaderModelOnly", model=alone, **BIG)
    expected = engine_with(lora, open_model(bundle, variant, teacher), architecture, inputs)
    for model in (switched(first, variant=variant), last, alone):
        assert relative_error(velocity(model), expected) < TOLERANCE


@edits
@pytest.mark.parametrize("variant", DEPTH)
def test_controlnet_as_on_the_full_model(whole, switched, velocity, reference, control, variant):
    ours = switched(whole, variant=variant)
    actual = velocity(ours, positive=control())
    assert relative_error(actual, velocity(reference(variant), positive=control())) < 1e-5
    assert relative_error(actual, velocity(ours)) > 0.05


@edits
@pytest.mark.parametrize("variant", DEPTH)
def test_skip_layer_guidance_as_on_the_full_model(
    whole, switched, run_node, velocity, reference, variant
):
    options = {
        "double_layers": "0, 5",
        "single_layers": "",
        "scale": 3.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
    }
    (ours,) = run_node("SkipLayerGuidanceDiT", model=switched(whole, variant=variant), **options)
    (full,) = run_node("SkipLayerGuidanceDiT", model=reference(variant), **options)
    actual = velocity(ours)
    assert relative_error(actual, velocity(full)) < 1e-5
    assert relative_error(actual, velocity(switched(whole, variant=variant))) > 0.05


@edits
@pytest.mark.parametrize("variant", DEPTH)
def test_a_sampled_latent_as_on_the_full_model(
    whole, switched, run_node, reference, inputs, variant
):
    def sampled(model):
        (model,) = run_node("ModelSamplingAuraFlow", model=model, shift=3.1)
        options = {
            "seed": 1,
            "steps": 3,
            "cfg": 2.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1.0,
        }
        latent = {"samples": torch.zeros(1, 16, 1, 8, 12)}
        conditioning = {
            "positive": [[inputs.text, inputs.more]],
            "negative": [[inputs.text[:, ::2], inputs.more]],
        }
        return run_node("KSampler", model=model, latent_image=latent, **conditioning, **options)[0][
            "samples"
        ]

    ours = sampled(switched(whole, variant=variant))
    assert relative_error(ours, sampled(reference(variant))) < 1e-5
    assert relative_error(ours, sampled(whole)) > 0.05
