"""The host's own nodes on pruned models give what they give on the host's full-depth model with
student weights at u and the blocks behind it skipped, or, where width is pruned, what the engine
gives with the LoRA in its weights. Architectures whose maps the host fuses; Qwen-Image's own are in
`test_stock_nodes.py`."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from ppcl_engine.models.bundle import Bundle
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.weights import Weights, expected_shapes
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ..controlled import controlled
from ..forwards import engine_forward, relative_error
from .adapted import ADAPTED, Adapted

TOLERANCE = 1e-4
RANK, IMAGE_TOKENS = 3, 24
NAMES = {"fused": "the host's", "split": "diffusers'"}


pytestmark = pytest.mark.parametrize("architecture", [*ADAPTED], indirect=True)


@pytest.fixture(scope="module")
def adapted(architecture) -> Adapted:
    return ADAPTED[architecture.name]


def changes(architecture, teacher, names: str, unnamed: str) -> tuple[dict, dict]:
    """(a LoRA file's tensors, the change of every matrix in a block by diffusers' names). Names of
    q, k, v as the host has them, in one map, or as diffusers does, each by itself."""
    generator, stored, found = torch.Generator().manual_seed(2), {}, {}
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
            found[key] = change("transformer." + key.removesuffix(".weight"), *shapes[key])
        return stored, found
    whole = {
        name: change("diffusion_model." + name.removesuffix(".weight"), *shape)
        for name, shape in wholes.items()
    }
    for key, part in parts.items():
        pieces = whole[part.name].chunk(part.of)
        found[key] = torch.cat([pieces[piece] for piece in part.pieces])
    return stored, found


@pytest.fixture(scope="module")
def loras(models, architecture, teacher, adapted) -> dict[str, dict]:
    found = {}
    for names in NAMES:
        stored, found[names] = changes(architecture, teacher, names, adapted.unnamed)
        write_tensors(models.loras / f"{architecture.name}_{names}.safetensors", stored)
    return found


@pytest.fixture(scope="module")
def patched(run_node, loras, architecture):
    def run(model, names: str):
        name = f"{architecture.name}_{names}.safetensors"
        return run_node("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=1.0)[0]

    return run


@pytest.fixture(scope="module")
def reference(load, bundle, teacher, models, architecture, adapted):
    """The host's full-depth model with student weights, skipping; a correction is added behind its
    block."""
    parts, weights = Bundle(bundle), Weights(teacher)
    students = {i.name: parts.student(i, torch.float32, "cpu") for i in parts.plan.intervals}

    def corrected(student):
        def run(args, extra):
            out = extra["original_block"](args)
            if "txt" in out:
                image, text = (
                    student.correction.correct(s, out[k])
                    for s, k in (("image", "img"), ("text", "txt"))
                )
                return {"img": image, "txt": text}
            text, image = out["img"].split(
                [out["img"].shape[1] - IMAGE_TOKENS, IMAGE_TOKENS], dim=1
            )
            both = [student.correction.correct(s, x) for s, x in (("text", text), ("image", image))]
            return {"img": torch.cat(both, dim=1)}

        return run

    def make(names: list[str]):
        grafted = {key: weights.read(key) for key in weights.keys()}
        for name in names:
            prefix = architecture.block_prefix(weights.config, parts.plan.interval(name).first)
            own = students[name].state_dict().items()
            grafted |= {prefix + key: t for key, t in own if not key.startswith("correction.")}
        file = (
            models.diffusion_models / f"{architecture.name}_grafted_{'_'.join(names)}.safetensors"
        )
        write_tensors(file, grafted, TensorFile(teacher).metadata)
        model = load(file.name).clone()
        for name in names:
            first, *others = parts.plan.interval(name).blocks
            for index in others:
                model.set_model_patch_replace(lambda args, extra: args, "dit", *adapted.slot(index))
            if parts.plan.interval(name).correction != "none":
                model.set_model_patch_replace(
                    corrected(students[name]), "dit", *adapted.slot(first)
                )
        return model

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
        found = velocity(patched(switched(whole, variant=variant), names))
        assert relative_error(found, velocity(patched(reference(variant), names))) < 1e-5, variant
        assert relative_error(found, velocity(switched(whole, variant=variant))) > 0.05, variant


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
        expected = _engine_with(
            loras[names], open_model(bundle, variant, teacher), architecture, inputs
        )
        for model in (
            switched(patched(whole, names), variant=variant),
            patched(switched(whole, variant=variant), names),
            patched(alone, names),
        ):
            assert relative_error(velocity(model), expected) < TOLERANCE, variant


def _engine_with(lora, model, architecture, inputs) -> torch.Tensor:
    """A map may be cut; a projection has no LoRA."""
    weights = dict(model.named_parameters())
    for key, change in lora.items():
        projected = (
            key.endswith("proj_mlp.weight")
            and weights.get(key) is not None
            and weights[key].shape != change.shape
        )
        if key in weights and not projected:
            weights[key].add_(_left(change, weights[key].shape))
    return engine_forward(architecture, model, inputs)


def _left(change: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Of a modulation that was cut to its first half, or loses the middle one of its thirds
    (attention is twice in it); of a joint map what attention reads."""
    if 3 * shape[0] == 2 * change.shape[0]:
        first, _, last = change.chunk(3)
        return torch.cat([first, last])
    return change[: shape[0], : shape[1]]


def test_controlnet_as_on_the_full_model(whole, switched, velocity, reference, control, adapted):
    for variant in adapted.depth:
        ours = switched(whole, variant=variant)
        found = velocity(ours, positive=control())
        assert relative_error(found, velocity(reference(variant), positive=control())) < 1e-5, (
            variant
        )
        assert relative_error(found, velocity(ours)) > 0.05, variant


def test_skip_layer_guidance_as_on_the_full_model(
    whole, switched, run_node, velocity, reference, adapted
):
    options = {**adapted.guided, "scale": 3.0, "start_percent": 0.0, "end_percent": 1.0}
    for variant in adapted.depth:
        (ours,) = run_node(
            "SkipLayerGuidanceDiT", model=switched(whole, variant=variant), **options
        )
        (full,) = run_node("SkipLayerGuidanceDiT", model=reference(variant), **options)
        found = velocity(ours)
        assert relative_error(found, velocity(full)) < 1e-5, variant
        assert relative_error(found, velocity(switched(whole, variant=variant))) > 0.05, variant


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
