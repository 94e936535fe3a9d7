"""What the host and other nodes do to a model: skipped sources, partial loading, fp8, unloading,
copies."""

import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher

from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ..conftest import copy_of
from ..forwards import relative_error

TEXT = "1-2,3-4,text:3-4"


@pytest.fixture(scope="module", params=["switched", "alone"])
def model_of(request, load, switched, whole, bundle, teacher):
    """A variant in both forms."""
    if request.param == "switched":
        return lambda variant: switched(whole, variant=variant)
    return lambda variant: load(bundle.name, base=teacher.name, variant=variant, switchable=False)


@pytest.fixture(scope="module")
def lora(models, teacher, run_node):
    generator, stored, file = torch.Generator().manual_seed(8), {}, TensorFile(teacher)
    for key in file.keys():
        if key.startswith("transformer_blocks.") and len(file.shape(key)) == 2:
            out, into = file.shape(key)
            name = key.removesuffix(".weight")
            stored[f"{name}.lora_A.weight"] = torch.randn(2, into, generator=generator) / into**0.5
            stored[f"{name}.lora_B.weight"] = 0.3 * torch.randn(out, 2, generator=generator)
    write_tensors(models.loras / "robust.safetensors", stored)
    options = {"lora_name": "robust.safetensors", "strength_model": 1.0}
    return lambda model: run_node("LoraLoaderModelOnly", model=model, **options)[0]


def skipping(model, replace):
    model = model.clone()
    model.set_model_patch_replace(replace, "dit", "double_block", 1)
    return model


def run_and_forget(args, extra):
    extra["original_block"](args)
    return args


def test_a_skipped_source_of_a_text_group(model_of, velocity, inputs):
    """The group reads what the source would have left, never what an earlier forward left."""
    model = model_of(TEXT)
    skipped = skipping(model, lambda args, extra: args)
    expected = velocity(skipping(model, run_and_forget))
    plain = velocity(model)
    velocity(model, positive=[[inputs.text.flip(1), {}]])  # leaves another text
    assert relative_error(velocity(skipped), expected) < 1e-6
    assert relative_error(plain, expected) > 0.01


def test_skip_layer_guidance_on_the_source(model_of, run_node, velocity):
    """Its second forward follows one in which the source ran."""
    model = model_of(TEXT)
    options = {"single_layers": "", "scale": 3.0, "start_percent": 0.0, "end_percent": 1.0}
    (guided,) = run_node("SkipLayerGuidanceDiT", model=model, double_layers="1", **options)
    plain, skipped = velocity(model), velocity(skipping(model, run_and_forget))
    assert relative_error(velocity(guided), plain + 3.0 * (plain - skipped)) < 1e-5


@pytest.mark.parametrize("variant", ["small", "smallest"])
def test_weights_that_stay_off_the_device(model_of, lora, velocity, pack, inputs, variant):
    """Partly loaded, LoRA included: the host casts and patches each weight when it is used."""
    model = lora(model_of(variant))
    expected = velocity(model)
    comfy.model_management.unload_all_models()
    pack("host.adapters").translate_patches(model)
    model.patch_model(device_to=torch.device("cpu"), lowvram_model_memory=50_000)
    try:
        assert model.model.lowvram_patch_counter > 10
        timestep = torch.full((1,), inputs.sigma)
        with torch.inference_mode():
            actual = model.model.diffusion_model(inputs.latents, timestep, inputs.text)[:, :, 0]
        assert relative_error(actual, expected) < 1e-5
    finally:
        model.unpatch_model(torch.device("cpu"))
    assert torch.equal(velocity(model), expected)  # loaded again, in full


@pytest.mark.parametrize("variant", ["small", "smallest"])
def test_unloading_gives_the_weights_back(model_of, lora, velocity, variant):
    model = model_of(variant)
    comfy.model_management.unload_all_models()
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    plain, changed = velocity(model), velocity(lora(model))
    comfy.model_management.unload_all_models()
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items()
    )
    assert torch.equal(velocity(model), plain) and not torch.equal(changed, plain)


@pytest.mark.parametrize("variant", ["full", "small", "smallest"])
@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "fp8_e5m2", "bf16"])
def test_weights_of_other_precision(load, switched, velocity, bundle, teacher, variant, dtype):
    """Switched and alone the same bits; as far from fp32 as such weights are."""
    options = {"base": teacher.name, "weight_dtype": dtype}
    actual = velocity(switched(load(bundle.name, **options), variant=variant))
    assert torch.equal(
        actual, velocity(load(bundle.name, variant=variant, switchable=False, **options))
    )
    exact = velocity(load(bundle.name, base=teacher.name, variant=variant, switchable=False))
    assert (
        0 < relative_error(actual, exact) < {"bf16": 0.1, "fp8_e4m3fn": 0.5, "fp8_e5m2": 1.0}[dtype]
    )


@pytest.mark.parametrize("variant", ["small", "smallest"])
def test_a_copy_of_the_model_stands_alone(load, velocity, bundle, teacher, variant):
    model = load(bundle.name, base=teacher.name, variant=variant, switchable=False)
    check_copy(model, velocity)


def test_a_copy_of_a_switchable_model_runs_its_own_blocks(
    load, switched, velocity, bundle, teacher
):
    if not hasattr(ModelPatcher, "deepclone_multigpu"):
        pytest.skip("this ComfyUI loads no second copy of a model")
    check_copy(switched(load(bundle.name, base=teacher.name), variant="small"), velocity)


def check_copy(model, velocity) -> None:
    expected, copied = velocity(model), copy_of(model)
    for parameter in model.model.parameters():
        parameter.data.zero_()
    assert torch.equal(velocity(copied), expected)
