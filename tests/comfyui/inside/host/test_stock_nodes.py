"""The host's own nodes on pruned models give what they give on the host's full-depth model with
student weights at u and the blocks behind it skipped, or, where width is pruned, what the engine
gives with the LoRA in its weights; with an edit model's references too."""

import comfy.controlnet
import comfy.hooks
import comfy.latent_formats
import comfy.ops
import pytest
import torch
from comfy.ldm.qwen_image.controlnet import QwenImageControlNetModel
from safetensors.torch import load_file

from ppcl_engine.models.bundle import Bundle
from ppcl_engine.models.opening import open_model
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ..cases import edits
from ..controlled import controlled
from ..forwards import engine_forward, relative_error

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
def reference(load, bundle, teacher, models):
    """The host's full-depth model with student weights, skipping; a correction is added behind its
    block."""
    parts, state = Bundle(bundle), TensorFile(teacher).read_all()
    students = {i.name: parts.student(i, torch.float32, "cpu") for i in parts.plan.intervals}

    def corrected(student):
        def run(args, extra):
            out = extra["original_block"](args)
            image, text = (
                student.correction.correct(s, out[k])
                for s, k in (("image", "img"), ("text", "txt"))
            )
            return {"img": image, "txt": text}

        return run

    def make(*names: str):
        grafted = dict(state)
        for name in names:
            for key, tensor in students[name].state_dict().items():
                if not key.startswith("correction."):
                    grafted[f"transformer_blocks.{parts.plan.interval(name).first}.{key}"] = tensor
        file = models.diffusion_models / f"grafted_{'_'.join(names)}.safetensors"
        write_tensors(file, grafted, TensorFile(teacher).metadata)
        model = load(file.name).clone()
        for name in names:
            interval = parts.plan.interval(name)
            for index in interval.blocks[1:]:
                model.set_model_patch_replace(
                    lambda args, extra: args, "dit", "double_block", index
                )
            if interval.correction != "none":
                model.set_model_patch_replace(
                    corrected(students[name]), "dit", "double_block", interval.first
                )
        return model

    made = {}
    return lambda name: made.setdefault(
        name, make(*(("1-2", "3-4") if name == "small" else (name,)))
    )


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
    found = velocity(ours)
    assert relative_error(found, velocity(expected)) < 1e-5
    assert relative_error(found, velocity(switched(whole, variant=variant))) > 0.05


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
    expected = _engine_with(lora, open_model(bundle, variant, teacher), architecture, inputs)
    for model in (switched(first, variant=variant), last, alone):
        assert relative_error(velocity(model), expected) < TOLERANCE


def _engine_with(lora, model, architecture, inputs) -> torch.Tensor:
    weights = dict(model.named_parameters())
    for key, change in lora.items():
        # a modulation may be cut to its first half; a projection has another shape, and no LoRA
        if key in weights:
            weights[key].add_(change[: len(weights[key])])
    return engine_forward(architecture, model, inputs)


@edits
@pytest.mark.parametrize("variant", DEPTH)
def test_controlnet_as_on_the_full_model(whole, switched, velocity, reference, control, variant):
    ours = switched(whole, variant=variant)
    found = velocity(ours, positive=control())
    assert relative_error(found, velocity(reference(variant), positive=control())) < 1e-5
    assert relative_error(found, velocity(ours)) > 0.05


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
    found = velocity(ours)
    assert relative_error(found, velocity(full)) < 1e-5
    assert relative_error(found, velocity(switched(whole, variant=variant))) > 0.05


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
