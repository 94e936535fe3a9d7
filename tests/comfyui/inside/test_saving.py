"""What the host's own Save nodes write of a pruned model loads again, in our loader, the host's and the engine."""

from __future__ import annotations

from pathlib import Path

import folder_paths
import pytest
import torch

from ppcl_engine.files import TensorFile, write_tensors

from .conftest import relative_error

TOLERANCE = 1e-4
PLAIN = {"qwen_image": "3-4", "flux1": "9-10", "sd35": "4-5"}  # an interval without a correction
pytestmark = pytest.mark.parametrize("architecture", [*PLAIN], indirect=True)


@pytest.fixture
def plain_variant(architecture) -> str:
    return PLAIN[architecture.name]


@pytest.fixture
def saved(models, run_node, monkeypatch):
    """The file that a Save node writes of a MODEL."""
    folder = models.diffusion_models
    monkeypatch.setattr(folder_paths, "output_directory", str(folder))
    there = set(folder.iterdir())

    def save(model, node: str = "ModelSave", **more) -> Path:
        before = set(folder.iterdir())
        run_node(node, model=model, filename_prefix="saved", **more)
        (path,) = set(folder.iterdir()) - before
        return path

    yield save
    for path in set(folder.iterdir()) - there:
        path.unlink()


@pytest.fixture(scope="module")
def lora(models, host_tensors, host_case) -> str:
    """A change of every matrix of every block."""
    generator, stored = torch.Generator().manual_seed(3), {}
    for name, tensor in host_tensors.items():
        if "blocks." in name and tensor.ndim == 2:
            module, (out, into) = name.removesuffix(".weight"), tensor.shape
            stored[f"diffusion_model.{module}.lora_A.weight"] = torch.randn(2, into, generator=generator) / into**0.5
            stored[f"diffusion_model.{module}.lora_B.weight"] = 0.3 * torch.randn(out, 2, generator=generator)
    path = models.loras / f"{host_case.file}_saved.safetensors"
    write_tensors(path, stored)
    return path.name


@pytest.fixture
def opened(load, run_node, engine_velocity, velocity):
    """What a file draws, by whatever opens it."""

    def draw(path: Path) -> dict[str, torch.Tensor]:
        (stock,) = run_node("UNETLoader", unet_name=path.name, weight_dtype="default")
        return {"ours": velocity(load(path.name)), "host": velocity(stock), "engine": engine_velocity(path)}

    return draw


@pytest.mark.parametrize("switchable", [True, False])
@pytest.mark.parametrize("variant", ["full", "small", "smallest", "plain"])
def test_a_variant(saved, opened, load, velocity, bundle, teacher, plain_variant, variant, switchable):
    variant = plain_variant if variant == "plain" else variant
    model = load(bundle.name, base=teacher.name, variant=variant, switchable=switchable)
    path = saved(model)
    expected = velocity(model)
    for name, found in opened(path).items():
        assert relative_error(found, expected) < TOLERANCE, name


@pytest.mark.parametrize("switchable", [True, False])
@pytest.mark.parametrize("variant", ["small", "smallest"])
@pytest.mark.parametrize("first", ["saved", "sampled"])
def test_with_a_lora(saved, opened, load, run_node, velocity, bundle, teacher, lora, variant, switchable, first):
    """In the weights, students' too, whatever the model was used for before."""
    whole = load(bundle.name, base=teacher.name, variant=variant, switchable=switchable)
    (model,) = run_node("LoraLoaderModelOnly", model=whole, lora_name=lora, strength_model=0.7)
    expected = velocity(model) if first == "sampled" else None
    path = saved(model)
    again = velocity(model)
    assert expected is None or torch.equal(again, expected)
    assert relative_error(again, velocity(whole)) > 10 * TOLERANCE
    for name, found in opened(path).items():
        assert relative_error(found, again) < TOLERANCE, name
