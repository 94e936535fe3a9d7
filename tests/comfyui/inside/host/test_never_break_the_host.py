"""The host finds every other model as it would without this pack, whatever a file holds."""

import logging

import comfy.model_detection
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import pytest
import torch

from .stock_models import ASKED, MUST, SLOW, SMALL, empty_tensors, recent, stock_models


def detected(tensors: dict, prefix: str) -> tuple[str, dict]:
    """The class that the host chooses, and the configuration that it is given."""
    config = comfy.model_detection.model_config_from_unet(dict(tensors), prefix)
    return (type(config).__name__, dict(config.unet_config)) if config else ("none", {})


@pytest.fixture
def without_pack(pack, monkeypatch):
    def look(tensors: dict, prefix: str) -> tuple[str, dict]:
        with monkeypatch.context() as patch:
            patch.setattr(comfy.supported_models, "models", stock_models())
            return detected(tensors, prefix)

    return look


def test_the_host_finds_its_own_models_as_without_this_pack(pack, without_pack):
    classes = {}
    for known in stock_models():
        if known.__name__ in SLOW:
            continue
        try:
            tensors = empty_tensors(known)
        except (
            TypeError,
            KeyError,
            AssertionError,
            RuntimeError,
        ):  # it asks for more than is known here: see MUST
            continue
        for prefix in ("", "model.diffusion_model."):  # alone, and in a checkpoint
            named = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
            assert detected(named, prefix) == without_pack(named, prefix), known
        classes[known.__name__] = without_pack(tensors, "")[0]
    recognised = {name for name, chosen in classes.items() if name == chosen}
    assert recognised >= MUST["0.30.0" if recent() else "0.3.75"]


def class_named(name: str) -> type:
    return next(known for known in stock_models() if known.__name__ == name)


@pytest.mark.parametrize("name", ["Flux", "WAN21_T2V"])
def test_a_stock_file_loads_as_without_this_pack(pack, monkeypatch, name):
    """FLUX at its full width, in fp8. SDXL passes too, but can't be built small: its detection asks
    for the full one."""
    monkeypatch.setitem(ASKED, name, {**ASKED.get(name, {}), **SMALL[name]})
    shapes = {key: tensor.shape for key, tensor in empty_tensors(class_named(name)).items()}
    zero = torch.zeros((), dtype=torch.float8_e4m3fn)

    def loaded() -> tuple:
        model = comfy.sd.load_diffusion_model_state_dict(
            {key: zero.expand(shape) for key, shape in shapes.items()}
        ).model
        tensors = model.diffusion_model.state_dict()
        return type(model), {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}

    with_pack = loaded()
    monkeypatch.setattr(comfy.supported_models, "models", stock_models())
    assert with_pack == loaded()


def test_an_error_of_ours_leaves_the_file_to_the_host(pack, monkeypatch, caplog):
    """Whatever a file holds: the log names it, once, and the host goes on."""
    entries = pack("host.entries")

    def broken(*_):
        raise RecursionError("nested too deep")

    monkeypatch.setattr(entries, "transformer_of", broken)
    tensors = {"txt_norm.weight": torch.zeros(4), "img_in.weight": torch.zeros(4, 4)}
    (ours,) = entries.config_classes(pack("host.qwen_image").HOST)

    def load(unet_path: str) -> bool:
        return ours.matches(
            {"image_model": "qwen_image"}, tensors, unet_key_prefix_of_the_future=""
        )

    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr(
            comfy.supported_models_base.BASE, "matches", classmethod(lambda *_, **__: True)
        )
        assert load("/models/odd.safetensors") is False and load("/models/odd.safetensors") is False
    lines = [record.message for record in caplog.records if "PPCL" in record.message]
    assert len(lines) == 1 and "odd.safetensors" in lines[0] and "nested too deep" in lines[0]
