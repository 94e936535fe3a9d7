"""FLUX in files, where blocks of two kinds are counted through (what holds of others too:
`test_base_files.py`)."""

import json

import pytest
import torch

from ppcl_engine.architectures import architecture_named
from ppcl_engine.system.tensor_files import write_tensors

from ..forwards import relative_error

pytestmark = pytest.mark.parametrize("architecture", ["flux1"], indirect=True)
FLUX = architecture_named("flux1")
TOLERANCE = 1e-4


def test_a_released_model_by_its_intervals(load, velocity, engine_velocity, host_tensors, models):
    """Double blocks 2 and 3 are gone: what the file calls 2 is the teacher's 4, single blocks keep
    their numbers."""
    kept = {
        n: t
        for n, t in host_tensors.items()
        if not n.startswith(("double_blocks.2.", "double_blocks.3."))
    }
    kept = {n.replace("double_blocks.4.", "double_blocks.2."): t for n, t in kept.items()}
    config = FLUX.tiny_config | {"in_channels": 64, "num_layers": 3, "num_single_layers": 6}
    path = models.diffusion_models / "flux_released.safetensors"
    write_tensors(path, kept, {"config": json.dumps(config)})
    model = load(path.name, preset="by intervals", intervals="1-3")
    assert relative_error(velocity(model), engine_velocity(path)) < TOLERANCE
    transformer = model.model.diffusion_model
    assert torch.equal(
        transformer.double_blocks[4].img_mlp[0].weight,
        host_tensors["double_blocks.4.img_mlp.0.weight"],
    )
    assert (len(transformer.double_blocks), len(transformer.single_blocks)) == (5, 6)
    assert torch.equal(
        transformer.single_blocks[0].linear1.weight, host_tensors["single_blocks.0.linear1.weight"]
    )
    with pytest.raises(ValueError, match="the file has 9 blocks, the preset names 46"):
        load(path.name, preset="Flex.1-alpha")


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
        assert "8 of 11 blocks run; 7 parts are projected" in text
        shares.append(text.splitlines()[0].split(": ")[1].split(";")[0])
    assert shares[0] == shares[1]
    assert "100 % of" in run_node("PPCL_Info", model=load(teacher.name))[1]


def test_lora_report(run_node, smallest, models):
    modules = [
        "transformer_blocks.2.attn.to_q",
        "transformer_blocks.3.ff_context.net.2",
        "transformer_blocks.0.attn.to_k",
        "single_transformer_blocks.0.proj_mlp",
        "single_transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.0.proj_out",
        "single_transformer_blocks.2.attn.to_v",
    ]
    stored = {
        f"transformer.{m}.lora_{a}.weight": torch.zeros(1, 1)
        for m in [*modules, "joint.0"]
        for a in "AB"
    }
    write_tensors(models.loras / "flux_report.safetensors", stored)
    for model in smallest:
        text, _ = run_node("PPCL_LoraReport", model=model, lora="flux_report.safetensors")
        assert text.splitlines()[0].endswith(
            "covers 3 of 8 modules; 2 belong to removed blocks; 2 belong to projected parts; 1 are not of this model"
        )
