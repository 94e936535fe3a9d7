"""The host's own nodes on pruned models give what they give on the host's full-depth model with
student weights at u and the blocks behind it skipped, or, where width is pruned, what the engine
gives with the LoRA in its weights. Architectures whose maps the host fuses; Qwen-Image's own are in
`test_stock_nodes.py`."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from ppcl_engine.models.opening import open_model
from ppcl_engine.models.weights import Weights, expected_shapes
from ppcl_engine.system.tensor_files import write_tensors

from ..controlled import controlled
from ..forwards import relative_error
from .adapted import ADAPTED, Adapted, engine_with, full_depth_reference

TOLERANCE = 1e-4
RANK = 3
NAMES = {"fused": "the host's", "split": "diffusers'"}


pytestmark = pytest.mark.parametrize("architecture", [*ADAPTED], indirect=True)


@pytest.fixture(scope="module")
def adapted(architecture) -> Adapted:
    return ADAPTED[architecture.name]


def changes(architecture, teacher, names: str, unnamed: str) -> tuple[dict, dict]:
    """(a LoRA file's tensors, the change of every matrix in a block by diffusers' names). Names of
    q, k, v as the host has them, in one map, or as diffusers does, each by itself."""
    generator, stored, by_key = torch.Generator().manual_seed(2), {}, {}
    shapes = expected_shapes(architecture, Weights(teacher).config)
    parts = {
        key: architecture.to_comfyui(key, shapes)
        for key in shapes
        if "blocks." in key and len(shapes[key]) == 2
    }
    wholes = {}
    for key, part in parts.items():
        wholes.setdefault(part.name, (shapes[key][0] // len(part.pieces) * part.of, shapes[key][1]))

    def change(name: str, out: int, into: int) -> torch.Tensor:
        down, up = (
            torch.randn(RANK, into, generator=generator),
            torch.randn(out, RANK, generator=generator),
        )
        up *= 0.3 / into**0.5
        stored.update({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
        return up @ down

    if names == "split":
        for key in (key for key in parts if unnamed not in key):
            by_key[key] = change("transformer." + key.removesuffix(".weight"), *shapes[key])
        return stored, by_key
    whole = {
        name: change("diffusion_model." + name.removesuffix(".weight"), *shape)
        for name, shape in wholes.items()
    }
    for key, part in parts.items():
        pieces = whole[part.name].chunk(part.of)
        by_key[key] = torch.cat([pieces[piece] for piece in part.pieces])
    return stored, by_key


@pytest.fixture(scope="module")
def loras(models, architecture, teacher, adapted) -> dict[str, dict]:
    by_names = {}
    for names in NAMES:
        stored, by_names[names] = changes(architecture, teacher, names, adapted.unnamed)
        write_tensors(models.loras / f"{architecture.name}_{names}.safetensors", stored)
    return by_names


@pytest.fixture(scope="module")
def patched(run_node, loras, architecture):
    def run(model, names: str):
        name = f"{architecture.name}_{names}.safetensors"
        return run_node("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=1.0)[0]

    return run


@pytest.fixture(scope="module")
def reference(load, bundle, teacher, models, architecture, adapted):
    """variant -> the host's full-depth model that it has to match"""
    make = full_depth_reference(load, bundle, teacher, models, architecture, adapted.slot)
    return cache(lambda name: make(adapted.depth[name]))


@pytest.fixture(scope="module")
def control(run_node, inputs, adapted):
    """Conditioning with a ControlNet: the host's class of the architecture, built small, random."""
    torch.manual_seed(3)
    net = adapted.control()
    for parameter in net.control_model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)

    return controlled(run_node, inputs, net)


@pytest.mark.parametrize("names", NAMES)
def test_lora_as_on_the_full_model(whole, switched, patched, velocity, reference, adapted, names):
    for variant in adapted.depth:
        actual = velocity(patched(switched(whole, variant=variant), names))
        assert relative_error(actual, velocity(patched(reference(variant), names))) < 1e-5, variant
        assert relative_error(actual, velocity(switched(whole, variant=variant))) > 0.05, variant


@pytest.mark.parametrize("names", NAMES)
def test_lora_on_every_kind_of_variant(
    load,
    whole,
    switched,
    patched,
    velocity,
    loras,
    bundle,
    teacher,
    architecture,
    inputs,
    adapted,
    names,
):
    """Before the switch, behind it, and on the variant loaded alone: the same, and the engine's."""
    for variant in (*adapted.depth, *adapted.width):
        alone = load(bundle.name, base=teacher.name, variant=variant, switchable=False)
        expected = engine_with(
            loras[names], open_model(bundle, variant, teacher), architecture, inputs
        )
        for model in (
            switched(patched(whole, names), variant=variant),
            patched(switched(whole, variant=variant), names),
            patched(alone, names),
        ):
            assert relative_error(velocity(model), expected) < TOLERANCE, variant


def test_controlnet_as_on_the_full_model(whole, switched, velocity, reference, control, adapted):
    for variant in adapted.depth:
        ours = switched(whole, variant=variant)
        actual = velocity(ours, positive=control())
        assert relative_error(actual, velocity(reference(variant), positive=control())) < 1e-5, (
            variant
        )
        assert relative_error(actual, velocity(ours)) > 0.05, variant


def test_skip_layer_guidance_as_on_the_full_model(
    whole, switched, run_node, velocity, reference, adapted
):
    options = {**adapted.guided, "scale": 3.0, "start_percent": 0.0, "end_percent": 1.0}
    for variant in adapted.depth:
        (ours,) = run_node(
            "SkipLayerGuidanceDiT", model=switched(whole, variant=variant), **options
        )
        (full,) = run_node("SkipLayerGuidanceDiT", model=reference(variant), **options)
        actual = velocity(ours)
        assert relative_error(actual, velocity(full)) < 1e-5, variant
        assert relative_error(actual, velocity(switched(whole, variant=variant))) > 0.05, variant


def test_a_sampled_latent_as_on_the_full_model(whole, switched, run_node, reference, inputs):
    """With prompts of two lengths, so that a single block has to know how much of its sequence is
    text."""

    def sampled(model):
        options = {
            "seed": 1,
            "steps": 3,
            "cfg": 2.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1.0,
        }
        negative = [[inputs.text[:, ::2], inputs.more]]
        return run_node(
            "KSampler",
            model=model,
            latent_image={"samples": torch.zeros(1, 16, 8, 12)},
            **options,
            positive=[[inputs.text, inputs.more]],
            negative=negative,
        )[0]["samples"]

    ours = sampled(switched(whole, variant="small"))
    assert relative_error(ours, sampled(reference("small"))) < 1e-5
    assert relative_error(ours, sampled(whole)) > 0.05
