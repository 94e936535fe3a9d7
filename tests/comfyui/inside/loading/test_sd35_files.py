"""SD3.5 in files, where the host takes the number of blocks from the width (what holds of others
too: `test_base_files.py`)."""

import json

import pytest
import torch

from ppcl_engine.architectures import architecture_named
from ppcl_engine.models.stored_layout import COMFYUI_PREFIX
from ppcl_engine.system.tensor_files import write_tensors

from ....tiny.models import comfyui_state, tiny_model
from ..forwards import relative_error
from .test_stock_host import without_the_pack

pytestmark = pytest.mark.parametrize("architecture", ["sd35"], indirect=True)
SD35 = architecture_named("sd35")
TOLERANCE = 1e-4
REAL = {  # heads as wide, and for 4 blocks as many, as the host takes for granted
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "caption_projection_dim": 256,
    "dual_attention_layers": [0, 1],
}


@pytest.fixture(scope="module")
def of_depth(models):
    """A file of so many blocks, by the host's names or by diffusers'."""

    def make(blocks: int, names: str = "host") -> str:
        model = tiny_model(SD35, num_layers=blocks, **REAL)
        tensors = comfyui_state(SD35, model) if names == "host" else model.state_dict()
        path = models.diffusion_models / f"sd35_{blocks}_{names}.safetensors"
        write_tensors(
            path,
            tensors,
            {"config": json.dumps({**SD35.tiny_config, **REAL, "num_layers": blocks})},
        )
        return path.name

    return make


def test_a_whole_model_is_the_hosts_own(of_depth, run_node, velocity, engine_velocity, models):
    name = of_depth(4)
    (model,) = run_node("UNETLoader", unet_name=name, weight_dtype="default")
    assert not hasattr(model.model.diffusion_model, "ppcl")
    assert (
        relative_error(velocity(model), engine_velocity(models.diffusion_models / name)) < TOLERANCE
    )


@pytest.mark.parametrize("names", ["host", "diffusers"])
def test_fewer_blocks_that_nothing_is_said_of(
    of_depth, load, run_node, velocity, engine_velocity, models, names
):
    """The host alone stops where shapes do not fit, and so do its loaders with the pack; our loader
    knows both layouts."""
    name = of_depth(3, names)
    with without_the_pack(), pytest.raises(RuntimeError, match="size mismatch"):
        run_node("UNETLoader", unet_name=name, weight_dtype="default")
    with pytest.raises(
        ValueError,
        match="has 3 blocks, but a full model of its width has 4; load it with Load Pruned Model",
    ):
        run_node("UNETLoader", unet_name=name, weight_dtype="default")
    assert (
        relative_error(velocity(load(name)), engine_velocity(models.diffusion_models / name))
        < TOLERANCE
    )


def test_a_depth_pruned_export_in_a_host_without_the_pack(exported, models, run_node):
    path = exported(models.diffusion_models, "comfyui", "sd35_no_pack", "4-5")
    with without_the_pack(), pytest.raises(RuntimeError, match="size mismatch"):
        run_node("UNETLoader", unet_name=path.name, weight_dtype="default")


def test_blocks_that_attend_twice_keep_their_numbers(
    load, velocity, engine_velocity, host_tensors, host_case, models
):
    """Block 1 is gone: what the file calls 1 is the teacher's 2."""
    kept = {}
    for name, tensor in host_tensors.items():
        where = name.split(".")
        if where[0] != "joint_blocks" or where[1] == "0":
            kept[name] = tensor
        elif where[1] != "1":
            kept[".".join([where[0], str(int(where[1]) - 1), *where[2:]])] = tensor
    config = {
        **SD35.tiny_config,
        **host_case.channels,
        "num_layers": 7,
        "dual_attention_layers": [0, 1],
    }
    path = models.diffusion_models / "sd35_released.safetensors"
    write_tensors(
        path, {COMFYUI_PREFIX + n: t for n, t in kept.items()}, {"config": json.dumps(config)}
    )
    model = load(path.name, preset="by intervals", intervals="0-1")
    assert relative_error(velocity(model), engine_velocity(path)) < TOLERANCE
    blocks = model.model.diffusion_model.joint_blocks
    assert len(blocks) == 8 and not list(blocks[1].parameters())
    assert [hasattr(getattr(block, "x_block", None), "attn2") for block in blocks] == [
        True,
        False,
        True,
        *[False] * 5,
    ]
    name = "joint_blocks.2.x_block.attn2.qkv.weight"
    assert torch.equal(model.model.diffusion_model.state_dict()[name], host_tensors[name])


def test_heads_of_another_width_are_one_line(make_model, save_model, load, models):
    save_model(
        models.diffusion_models / "sd35_narrow.safetensors",
        make_model(in_channels=16, out_channels=16),
    )
    with pytest.raises(
        ValueError, match="ComfyUI runs sd35 with heads of 64 only, but this model has heads of 16"
    ):
        load("sd35_narrow.safetensors")


def test_it_has_nothing_to_fold(load, bundle, teacher):
    with pytest.raises(
        ValueError, match="no modulations to fold: .* the timestep and pooled text; set fold to off"
    ):
        load(bundle.name, base=teacher.name, fold="basis")


@pytest.fixture(scope="module")
def smallest(load, switched, whole, bundle, teacher) -> tuple:
    """The same variant: loaded alone, and a branch of the switchable bundle."""
    alone = load(bundle.name, base=teacher.name, variant="smallest", switchable=False)
    return alone, switched(whole, variant="smallest")


def test_info(load, run_node, smallest, teacher):
    shares = []
    for model in smallest:
        picture, text = run_node("PPCL_Info", model=model)
        assert picture.shape[2] == 1800
        assert "5 of 8 blocks run; 7 parts are projected" in text
        shares.append(text.splitlines()[0].split(": ")[1].split(";")[0])
    assert shares[0] == shares[1]
    assert "100 % of" in run_node("PPCL_Info", model=load(teacher.name))[1]


def test_lora_report(run_node, smallest, models):
    modules = [
        "2.attn.to_q",
        "1.attn2.to_k",
        "0.ff_context.net.2",
        "4.norm1_context.linear",
        "6.attn.to_v",
        "7.attn.add_k_proj",
    ]
    stored = {
        f"transformer.transformer_blocks.{m}.lora_{a}.weight": torch.zeros(1, 1)
        for m in [*modules, "9.x"]
        for a in "AB"
    }
    write_tensors(models.loras / "sd35_report.safetensors", stored)
    for model in smallest:
        text, _ = run_node("PPCL_LoraReport", model=model, lora="sd35_report.safetensors")
        assert text.splitlines()[0].endswith(
            "covers 3 of 7 modules; 1 belong to removed blocks; 2 belong to projected parts; 1 are not of this model"
        )
