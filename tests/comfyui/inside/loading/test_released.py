"""Files in the layout of the method's authors: folders and single files, old and new text
projections, LoRA by the original model's block numbers."""

import pytest
import torch

from ppcl_engine.system.tensor_files import write_tensors

from ....tiny.released_models import (
    FFN,
    INTERVALS,
    KEPT,
    LISTS,
    TEACHER_BLOCKS,
    TEXT,
    reference,
    released_state,
    write_folder,
)
from ..forwards import relative_error

TOLERANCE = 1e-4
SIZES = {
    "in_channels": 64,
    "out_channels": 16,
    "attention_head_dim": 32,
    "axes_dims_rope": [4, 14, 14],
}
NO_WIDTH = {name: [] for name in LISTS}
NAMED = {"text_ffn": LISTS, "text": TEXT, "ffn": FFN, "depth": NO_WIDTH}


@pytest.fixture(scope="module")
def big(make_model):
    return make_model(num_layers=TEACHER_BLOCKS, **SIZES)


@pytest.fixture(scope="module")
def states(big):
    return {name: released_state(big, KEPT, lists) for name, lists in NAMED.items()}


@pytest.fixture(scope="module")
def folders(models, states, make_model, model_config):
    config = model_config(make_model(num_layers=len(KEPT), **SIZES))
    for name, state in states.items():
        write_folder(models.ppcl / f"released_{name}", state, config, NAMED[name], "sharded")
        write_tensors(models.diffusion_models / f"single_{name}.safetensors", state)


@pytest.fixture(scope="module")
def expected(states, make_model, inputs, architecture):
    """By method.md's formulas written out by hand."""

    def make(name: str, legacy: bool = False, state: dict | None = None) -> torch.Tensor:
        latents = inputs.latents[:, :, 0]
        grid = architecture.grid(latents)
        rows = {
            "hidden_states": architecture.pack(latents),
            "encoder_hidden_states": inputs.text,
            "encoder_hidden_states_mask": torch.ones(inputs.text.shape[:2], dtype=torch.bool),
            "timestep": torch.tensor([inputs.sigma]),
            "grid": grid,
        }
        with torch.no_grad():
            plain = make_model(num_layers=len(KEPT), **SIZES)
            tokens = reference(plain, state or states[name], NAMED[name], rows, legacy)
        return architecture.unpack(tokens, grid)

    return make


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("preset", ["as numbered", "by intervals"])
def test_folders(load, folders, velocity, expected, name, preset):
    model = load(f"released_{name}/", preset=preset, intervals=INTERVALS)
    blocks = model.model.diffusion_model.transformer_blocks
    assert len(blocks) == (TEACHER_BLOCKS if preset == "by intervals" else len(KEPT))
    assert relative_error(velocity(model), expected(name)) < TOLERANCE


@pytest.mark.parametrize("name", ["text", "text_ffn"])
def test_the_older_form_of_a_text_projection(load, folders, velocity, expected, name):
    actual = velocity(load(f"released_{name}/", legacy_text=True))
    assert (
        relative_error(actual, expected(name, legacy=True))
        < TOLERANCE
        < relative_error(actual, expected(name))
    )


@pytest.mark.parametrize("name", NAMED)
def test_the_hosts_own_loader_reads_a_single_file(run_node, folders, velocity, expected, name):
    (model,) = run_node(
        "UNETLoader", unet_name=f"single_{name}.safetensors", weight_dtype="default"
    )
    assert relative_error(velocity(model), expected(name)) < TOLERANCE


@pytest.mark.parametrize("name", NAMED)
def test_lora_by_the_original_numbers(
    load, run_node, folders, velocity, expected, states, models, big, name
):
    """Each of the original's blocks has a change; those of removed blocks and parts have nowhere to
    go."""
    generator, stored = torch.Generator().manual_seed(7), {}
    state = {key: tensor.clone() for key, tensor in states[name].items()}
    for key, weight in big.state_dict().items():
        if not (key.startswith("transformer_blocks.") and weight.ndim == 2):
            continue
        down = torch.randn(3, weight.shape[1], generator=generator)
        up = 0.3 * torch.randn(len(weight), 3, generator=generator) / weight.shape[1] ** 0.5
        part = key.removesuffix(".weight")
        stored |= {f"{part}.lora_A.weight": down, f"{part}.lora_B.weight": up}
        old, rest = key.removeprefix("transformer_blocks.").split(".", 1)
        kept = f"transformer_blocks.{KEPT.index(int(old))}.{rest}" if int(old) in KEPT else None
        if kept in state:
            state[kept] += (up @ down)[: len(state[kept])]
    write_tensors(models.loras / f"original_{name}.safetensors", stored)
    model = load(f"released_{name}/", preset="by intervals", intervals=INTERVALS)
    (model,) = run_node(
        "LoraLoaderModelOnly",
        model=model,
        lora_name=f"original_{name}.safetensors",
        strength_model=1.0,
    )
    assert relative_error(velocity(model), expected(name, state=state)) < TOLERANCE
