"""FLUX in files: the layouts and precisions that a bundle's base, a standalone and the host's own files come in."""

import copy
import json

import comfy.model_management
import pytest
import torch

from ppcl_engine.architectures import architecture_named
from ppcl_engine.checkpoint import COMFYUI_PREFIX, Weights
from ppcl_engine.files import write_tensors
from ppcl_engine.standalone import Source, comfyui_sources

from .conftest import relative_error

pytestmark = pytest.mark.parametrize("architecture", ["flux1"], indirect=True)
FLUX = architecture_named("flux1")
TOLERANCE, FP8, LARGEST = 1e-4, torch.float8_e4m3fn, 448.0
VARIANTS = ["full", "small", "smallest"]


@pytest.fixture(scope="module")
def host_tensors(teacher) -> dict[str, torch.Tensor]:
    """The teacher by the host's names, as its single files are."""
    weights = Weights(teacher)
    sources = {k: Source(weights.shape(k), lambda k=k: weights.read(k)) for k in weights.keys()}
    return {name: source.read() for name, source in comfyui_sources(FLUX, sources).items()}


@pytest.fixture(scope="module")
def base_of(host_tensors, models):
    """The teacher's single file, in one of the forms that such models are published in."""

    def scaled(tensors: dict) -> dict:
        found = {"scaled_fp8": torch.zeros(2, dtype=FP8)}
        for name, tensor in tensors.items():
            if tensor.ndim == 2:
                scale = tensor.abs().max() / LARGEST
                found |= {name: (tensor / scale).to(FP8), name.removesuffix("weight") + "scale_weight": scale}
            else:
                found[name] = tensor.to(torch.bfloat16)
        return found

    forms = {
        "fp32": lambda t: t,
        "checkpoint": lambda t: {COMFYUI_PREFIX + name: tensor for name, tensor in t.items()},
        "bf16": lambda t: {name: tensor.bfloat16() for name, tensor in t.items()},
        "fp8": lambda t: {name: tensor.to(FP8) for name, tensor in t.items()},
        "scaled": scaled,
    }

    def make(form: str) -> str:
        path = models.diffusion_models / f"flux_base_{form}.safetensors"
        if not path.exists():
            config = {
                "config": json.dumps(FLUX.tiny_config | {"in_channels": 64, "num_layers": 5, "num_single_layers": 6})
            }
            write_tensors(path, forms[form](host_tensors), config)
        return path.name

    return make


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["fp32", "checkpoint"])
def test_a_base_by_the_hosts_names(load, switched, velocity, engine_velocity, bundle, teacher, base_of, form, variant):
    base, expected = base_of(form), engine_velocity(bundle, variant, teacher)
    assert relative_error(velocity(switched(load(bundle.name, base=base), variant=variant)), expected) < TOLERANCE
    alone = load(bundle.name, base=base, variant=variant, switchable=False)
    assert relative_error(velocity(alone), expected) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("form", "far"), [("bf16", 0.1), ("fp8", 0.3), ("scaled", 0.2)])
def test_a_base_of_less_precision(load, switched, velocity, bundle, base_of, form, far, variant, caplog):
    exact = velocity(load(bundle.name, base=base_of("fp32"), variant=variant, switchable=False))
    options = {"base": base_of(form), "weight_dtype": "default"}
    caplog.clear()
    found = velocity(switched(load(bundle.name, **options), variant=variant))
    alone = velocity(load(bundle.name, variant=variant, switchable=False, **options))
    assert relative_error(found, alone) < 0.02  # what is cut has a scale of its own when it is alone
    assert 0 < relative_error(found, exact) < far
    assert not [line for line in caplog.messages if "missing" in line]


def test_another_base_is_one_line(load, bundle, host_tensors, models):
    other = {n: t + 0.1 if t.ndim == 1 else t for n, t in host_tensors.items()}
    write_tensors(models.diffusion_models / "flux_other.safetensors", other)
    with pytest.raises(ValueError, match="is not the teacher"):
        load(bundle.name, base="flux_other.safetensors")
    fewer = {n: t for n, t in host_tensors.items() if not n.startswith("single_blocks.5.")}
    write_tensors(models.diffusion_models / "flux_fewer.safetensors", fewer)
    with pytest.raises(ValueError, match="has 10 blocks, the bundle's teacher 11"):
        load(bundle.name, base="flux_fewer.safetensors")


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_a_depth_pruned_file_of_the_stock_layouts(
    load, velocity, engine_velocity, exported, models, bundle, teacher, layout
):
    """Counted anew, with the teacher's numbers beside: a LoRA of the full model then finds its blocks."""
    path = exported(models.diffusion_models if layout == "comfyui" else models.ppcl, layout, f"flux_{layout}", "9-10")
    model = load(path.name if layout == "comfyui" else f"{path.name}/")
    assert relative_error(velocity(model), engine_velocity(bundle, "9-10", teacher)) < TOLERANCE
    blocks = model.model.diffusion_model.single_blocks
    assert [any(True for _ in block.parameters()) for block in blocks] == [True] * 5 + [False] * (len(blocks) - 5)


def test_a_released_model_by_its_intervals(load, velocity, engine_velocity, host_tensors, models):
    """Double blocks 2 and 3 are gone: what the file calls 2 is the teacher's 4, single blocks keep their numbers."""
    kept = {n: t for n, t in host_tensors.items() if not n.startswith(("double_blocks.2.", "double_blocks.3."))}
    kept = {n.replace("double_blocks.4.", "double_blocks.2."): t for n, t in kept.items()}
    config = FLUX.tiny_config | {"in_channels": 64, "num_layers": 3, "num_single_layers": 6}
    path = models.diffusion_models / "flux_released.safetensors"
    write_tensors(path, kept, {"config": json.dumps(config)})
    model = load(path.name, preset="by intervals", intervals="1-3")
    assert relative_error(velocity(model), engine_velocity(path)) < TOLERANCE
    transformer = model.model.diffusion_model
    assert torch.equal(transformer.double_blocks[4].img_mlp[0].weight, host_tensors["double_blocks.4.img_mlp.0.weight"])
    assert (len(transformer.double_blocks), len(transformer.single_blocks)) == (5, 6)
    assert torch.equal(transformer.single_blocks[0].linear1.weight, host_tensors["single_blocks.0.linear1.weight"])
    with pytest.raises(ValueError, match="the file has 9 blocks, the preset names 46"):
        load(path.name, preset="Flex.1-alpha")


def test_a_stock_file_of_another_size(load, velocity, engine_velocity, base_of, teacher, run_node):
    """The full model, in our loader and in the host's own once the pack is there."""
    expected = engine_velocity(teacher)
    assert relative_error(velocity(load(base_of("fp32"))), expected) < TOLERANCE
    assert relative_error(velocity(load(teacher.name)), expected) < TOLERANCE


@pytest.mark.parametrize("variant", ["small", "smallest"])
@pytest.mark.parametrize("alone", [False, True])
def test_weights_that_stay_off_the_device(
    load, switched, velocity, bundle, teacher, run_node, models, pack, variant, alone
):
    """Partly loaded, with a LoRA on every kind of map: the host casts and patches each weight when it is used."""
    stored, generator = {}, torch.Generator().manual_seed(1)
    for name, out, into in (
        ("double_blocks.0.txt_mod.lin", 192, 32), ("double_blocks.3.img_attn.qkv", 96, 32),
        ("single_blocks.0.linear1", 224, 32), ("single_blocks.1.linear2", 32, 160),
    ):  # fmt: skip
        stored[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(2, into, generator=generator) / into**0.5
        stored[f"diffusion_model.{name}.lora_B.weight"] = 0.5 * torch.randn(out, 2, generator=generator)
    write_tensors(models.loras / "flux_four.safetensors", stored)
    model = load(bundle.name, base=teacher.name, variant=variant, switchable=not alone)
    (model,) = run_node("LoraLoaderModelOnly", model=model, lora_name="flux_four.safetensors", strength_model=1.0)
    expected = velocity(model)
    comfy.model_management.unload_all_models()
    pack("host.adapters").translate_patches(model)
    model.patch_model(device_to=torch.device("cpu"), lowvram_model_memory=20_000)
    try:
        assert model.model.lowvram_patch_counter > 2
        assert relative_error(velocity(model), expected) < 1e-5
    finally:
        model.unpatch_model(torch.device("cpu"))


def test_a_copy_of_the_model_stands_alone(load, velocity, bundle, teacher):
    model = load(bundle.name, base=teacher.name, variant="smallest", switchable=False)
    expected = velocity(model)
    copied = model.clone()
    copied.model = copy.deepcopy(model.model)
    for parameter in model.model.parameters():
        parameter.data.zero_()
    model.model.diffusion_model.ppcl.texts.tokens = -1
    assert torch.equal(velocity(copied), expected)


def test_info_and_lora_report(load, run_node, switched, bundle, teacher, models):
    whole = load(bundle.name, base=teacher.name)
    picture, text = run_node("PPCL_Info", model=switched(whole, variant="smallest"))
    assert picture.shape[2] == 1800 and "8 of 11 blocks run; 7 parts are projected" in text
    alone = load(bundle.name, base=teacher.name, variant="smallest", switchable=False)
    shares = [run_node("PPCL_Info", model=m)[1].splitlines()[0].split(": ")[1].split(";")[0]
              for m in (alone, switched(whole, variant="smallest"))]  # fmt: skip
    assert shares[0] == shares[1]
    assert "100 % of" in run_node("PPCL_Info", model=load(teacher.name))[1]
    modules = ["transformer_blocks.2.attn.to_q", "transformer_blocks.3.ff_context.net.2", "transformer_blocks.0.attn.to_k",
               "single_transformer_blocks.0.proj_mlp", "single_transformer_blocks.0.attn.to_q",
               "single_transformer_blocks.0.proj_out", "single_transformer_blocks.2.attn.to_v"]  # fmt: skip
    stored = {f"transformer.{m}.lora_{a}.weight": torch.zeros(1, 1) for m in [*modules, "joint.0"] for a in "AB"}
    write_tensors(models.loras / "flux_report.safetensors", stored)
    for model in (alone, switched(whole, variant="smallest")):
        (text,) = run_node("PPCL_LoraReport", model=model, lora="flux_report.safetensors")
        assert text.splitlines()[0].endswith(
            "covers 3 of 8 modules; 2 belong to removed blocks; 2 belong to projected parts; 1 are not of this model"
        )
