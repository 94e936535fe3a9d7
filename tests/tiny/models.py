"""diffusers' own classes at the tiny size of an architecture, with weights so large that every
block matters."""

from __future__ import annotations

from pathlib import Path

import torch

from ppcl_engine.architectures import Architecture
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.tensor_sources import Source, comfyui_sources
from ppcl_engine.models.weights import Weights
from ppcl_engine.system.tensor_files import write_tensors

GRIDS = {"qwen_image_21": (1, 2, 4)}
"""where diffusers' class does not take any number of tokens"""


def tiny_grid(architecture: Architecture) -> tuple[int, int, int]:
    return GRIDS.get(architecture.name, (1, 2, 3))


def tiny_model(architecture: Architecture, seed: int = 0, **changes) -> torch.nn.Module:
    import diffusers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(diffusers, architecture.diffusers_class)(
            **{**architecture.tiny_config, **changes}
        ).eval()
        enlarge(model)
    return model.requires_grad_(False)


def enlarge(model: torch.nn.Module) -> None:
    """As in a trained model; at random."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(
                noise / parameter.shape[1] ** 0.5
                if parameter.ndim == 2
                else parameter + 0.1 * noise
            )


def tiny_inputs(architecture: Architecture, grid=None, samples: int = 4, **changes) -> dict:
    """Without padding; `changes`: of the configuration."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return architecture.random_inputs(
            {**architecture.tiny_config, **changes},
            samples,
            grid or tiny_grid(architecture),
            5,
            "cpu",
        )


def comfyui_state(architecture: Architecture, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    sources = {
        name: Source(tuple(t.shape), lambda t=t: t) for name, t in model.state_dict().items()
    }
    return {name: source.read() for name, source in comfyui_sources(architecture, sources).items()}


def check_comfyui_file(
    architecture: Architecture, model: torch.nn.Module, inputs: dict, folder: Path, prefix: str
):
    """A file in ComfyUI's layout, and a diffusers folder in parts, are the model itself. Returns
    the first's weights."""
    stored = {prefix + name: tensor for name, tensor in comfyui_state(architecture, model).items()}
    write_tensors(folder / "a.safetensors", stored)
    weights, opened = Weights(folder / "a.safetensors"), open_model(folder / "a.safetensors")
    assert weights.architecture is architecture
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in opened.state_dict().items())
    assert torch.equal(architecture.call(opened, inputs), architecture.call(model, inputs))
    model.save_pretrained(folder / "folder", max_shard_size="100KB")
    assert Weights(folder / "folder").fingerprint == weights.fingerprint
    assert torch.equal(
        architecture.call(open_model(folder / "folder"), inputs), architecture.call(model, inputs)
    )
    return weights
