"""The layouts and precisions that a bundle's base, a standalone and the host's own files come in,
of architectures whose maps the host fuses."""

from dataclasses import dataclass

import comfy.model_management
import pytest
import torch

from ppcl_engine.models.stored_layout import COMFYUI_PREFIX
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ..conftest import copy_of
from ..forwards import relative_error

TOLERANCE, FP8, LARGEST = 1e-4, torch.float8_e4m3fn, 448.0
VARIANTS = ["full", "small", "smallest"]
BESIDE = (
    "text_encoders.t5xxl.transformer.shared.weight",
    "first_stage_model.decoder.conv_in.weight",
)


@dataclass(frozen=True, kw_only=True)
class Files:
    """What is known of an architecture's tiny teacher."""

    plain: str
    """an interval without a correction"""
    left: list[bool]
    """which blocks of that interval's list have weights once it is replaced"""
    last: str
    """of the last block"""
    blocks: int
    maps: tuple[tuple[str, int, int], ...]
    """(name, rows, columns) of maps that a LoRA changes, cut ones among them"""


FILES = {
    "flux1": Files(
        plain="9-10",
        left=[*[True] * 5, False],
        last="single_blocks.5.",
        blocks=11,
        maps=(
            ("double_blocks.0.txt_mod.lin", 192, 32),
            ("double_blocks.3.img_attn.qkv", 96, 32),
            ("single_blocks.0.linear1", 224, 32),
            ("single_blocks.1.linear2", 32, 160),
        ),
    ),
    "sd35": Files(
        plain="4-5",
        left=[*[True] * 5, False, True, True],
        last="joint_blocks.7.",
        blocks=8,
        maps=(
            ("joint_blocks.0.context_block.adaLN_modulation.1", 768, 128),
            ("joint_blocks.1.x_block.adaLN_modulation.1", 1152, 128),
            ("joint_blocks.1.x_block.attn2.qkv", 384, 128),
            ("joint_blocks.7.x_block.adaLN_modulation.1", 768, 128),
        ),
    ),
}
pytestmark = pytest.mark.parametrize("architecture", [*FILES], indirect=True)


@pytest.fixture
def known(architecture) -> Files:
    return FILES[architecture.name]


@pytest.fixture(scope="module")
def base_of(host_tensors, models, teacher, host_case):
    """The teacher's single file, in one of the forms that such models are published in."""

    def scaled(tensors: dict) -> dict:
        found = {"scaled_fp8": torch.zeros(2, dtype=FP8)}
        for name, tensor in tensors.items():
            if tensor.ndim == 2:
                scale = tensor.abs().max() / LARGEST
                found |= {
                    name: (tensor / scale).to(FP8),
                    name.removesuffix("weight") + "scale_weight": scale,
                }
            else:
                found[name] = tensor.to(torch.bfloat16)
        return found

    forms = {
        "fp32": lambda t: t,
        "checkpoint": lambda t: (
            {COMFYUI_PREFIX + name: tensor for name, tensor in t.items()}
            | dict.fromkeys(BESIDE, torch.ones(2))
        ),
        "bf16": lambda t: {name: tensor.bfloat16() for name, tensor in t.items()},
        "fp8": lambda t: {name: tensor.to(FP8) for name, tensor in t.items()},
        "scaled": scaled,
    }

    def make(form: str) -> str:
        path = models.diffusion_models / f"{host_case.file}_base_{form}.safetensors"
        if not path.exists():
            write_tensors(path, forms[form](host_tensors), TensorFile(teacher).metadata)
        return path.name

    return make


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["fp32", "checkpoint"])
def test_a_base_by_the_hosts_names(
    load, switched, velocity, engine_velocity, bundle, teacher, base_of, form, variant
):
    base, expected = base_of(form), engine_velocity(bundle, variant, teacher)
    assert (
        relative_error(velocity(switched(load(bundle.name, base=base), variant=variant)), expected)
        < TOLERANCE
    )
    alone = load(bundle.name, base=base, variant=variant, switchable=False)
    assert relative_error(velocity(alone), expected) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("form", "far"), [("bf16", 0.1), ("fp8", 0.3), ("scaled", 0.2)])
def test_a_base_of_less_precision(
    load, switched, velocity, bundle, base_of, form, far, variant, caplog
):
    exact = velocity(load(bundle.name, base=base_of("fp32"), variant=variant, switchable=False))
    options = {"base": base_of(form), "weight_dtype": "default"}
    caplog.clear()
    actual = velocity(switched(load(bundle.name, **options), variant=variant))
    alone = velocity(load(bundle.name, variant=variant, switchable=False, **options))
    # what is cut has a scale of its own when it is alone
    assert relative_error(actual, alone) < 0.02
    assert 0 < relative_error(actual, exact) < far
    assert not [line for line in caplog.messages if "missing" in line]


def test_another_base_is_one_line(load, bundle, host_tensors, models, host_case, known):
    other = {n: t + 0.1 if t.ndim == 1 else t for n, t in host_tensors.items()}
    write_tensors(models.diffusion_models / f"{host_case.file}_other.safetensors", other)
    with pytest.raises(ValueError, match="is not the teacher"):
        load(bundle.name, base=f"{host_case.file}_other.safetensors")
    fewer = {n: t for n, t in host_tensors.items() if not n.startswith(known.last)}
    write_tensors(models.diffusion_models / f"{host_case.file}_fewer.safetensors", fewer)
    with pytest.raises(
        ValueError, match=f"has {known.blocks - 1} blocks, the bundle's teacher has {known.blocks}"
    ):
        load(bundle.name, base=f"{host_case.file}_fewer.safetensors")


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_a_depth_pruned_file_of_the_stock_layouts(
    load, velocity, engine_velocity, exported, models, bundle, teacher, layout, host_case, known
):
    """Counted anew, with the teacher's numbers beside: a LoRA of the full model then finds its
    blocks."""
    path = exported(
        models.diffusion_models if layout == "comfyui" else models.ppcl,
        layout,
        f"{host_case.file}_{layout}",
        known.plain,
    )
    model = load(path.name if layout == "comfyui" else f"{path.name}/")
    assert (
        relative_error(velocity(model), engine_velocity(bundle, known.plain, teacher)) < TOLERANCE
    )
    name, _ = known.last.split(".", 1)
    blocks = getattr(model.model.diffusion_model, name)
    have_weights = [any(True for _ in block.parameters()) for block in blocks]
    assert have_weights == known.left[: len(have_weights)] and len(have_weights) >= len(
        known.left
    ) - (not known.left[-1])


def test_a_depth_pruned_file_in_the_hosts_loader(
    load, run_node, velocity, engine_velocity, exported, models, bundle, teacher, host_case, known
):
    """Which drops metadata: a tensor in the file says which blocks of the teacher it has."""
    path = exported(models.diffusion_models, "comfyui", f"{host_case.file}_alone", known.plain)
    (model,) = run_node("UNETLoader", unet_name=path.name, weight_dtype="default")
    assert (
        relative_error(velocity(model), engine_velocity(bundle, known.plain, teacher)) < TOLERANCE
    )
    blocks = getattr(model.model.diffusion_model, known.last.split(".")[0])
    assert [any(True for _ in block.parameters()) for block in blocks] == known.left


def test_a_stock_file_of_another_size(load, velocity, engine_velocity, base_of, teacher, run_node):
    """The full model, in our loader and in the host's own once the pack is there."""
    expected = engine_velocity(teacher)
    assert relative_error(velocity(load(base_of("fp32"))), expected) < TOLERANCE
    assert relative_error(velocity(load(teacher.name)), expected) < TOLERANCE


@pytest.fixture
def lora_on_maps(models, known, host_case) -> str:
    """Name of a LoRA file that changes a map of every kind."""
    stored, generator = {}, torch.Generator().manual_seed(1)
    for name, out, into in known.maps:
        down = torch.randn(2, into, generator=generator) / into**0.5
        up = 0.5 * torch.randn(out, 2, generator=generator)
        stored |= {
            f"diffusion_model.{name}.lora_A.weight": down,
            f"diffusion_model.{name}.lora_B.weight": up,
        }
    file = f"{host_case.file}_four.safetensors"
    write_tensors(models.loras / file, stored)
    return file


@pytest.mark.parametrize("variant", ["small", "smallest"])
@pytest.mark.parametrize("alone", [False, True])
def test_weights_that_stay_off_the_device(
    load,
    velocity,
    bundle,
    teacher,
    run_node,
    pack,
    variant,
    alone,
    lora_on_maps,
    as_loaded,
):
    """Partly loaded, with a LoRA on every kind of map: the host casts and patches each weight when
    it is used."""
    model = load(bundle.name, base=teacher.name, variant=variant, switchable=not alone)
    (model,) = run_node(
        "LoraLoaderModelOnly", model=model, lora_name=lora_on_maps, strength_model=1.0
    )
    expected = velocity(model)
    comfy.model_management.unload_all_models()
    pack("host.adapters").translate_patches(model)
    model.patch_model(device_to=torch.device("cpu"), lowvram_model_memory=20_000)
    try:
        assert model.model.lowvram_patch_counter > 2
        with as_loaded():
            assert relative_error(velocity(model), expected) < 1e-5
    finally:
        model.unpatch_model(torch.device("cpu"))


def test_a_copy_of_the_model_stands_alone(load, velocity, bundle, teacher):
    model = load(bundle.name, base=teacher.name, variant="smallest", switchable=False)
    expected = velocity(model)
    copied = copy_of(model)
    for parameter in model.model.parameters():
        parameter.data.zero_()
    model.model.diffusion_model.ppcl.texts.tokens = -1
    assert torch.equal(velocity(copied), expected)
