"""A host that is not as known is left alone, and later ones may give and ask for more."""

import asyncio
import logging
import re
import sys
from types import SimpleNamespace

import comfy.model_detection
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import pytest
import torch

import nodes as host_nodes
from ppcl_engine.system.tensor_files import TensorFile

from ..conftest import ROOT
from .stock_models import stock_models


@pytest.fixture
def pack_again(monkeypatch):
    """The pack, imported anew into a host that was changed; nothing of it stays."""

    def load() -> tuple[bool, dict]:
        before = dict(host_nodes.NODE_CLASS_MAPPINGS)
        name = str(ROOT).replace(".", "_x_")
        for module in [
            module for module in sys.modules if module == name or module.startswith(f"{name}.")
        ]:
            monkeypatch.delitem(sys.modules, module)
        worked = asyncio.run(host_nodes.load_custom_node(str(ROOT), module_parent="custom_nodes"))
        found = {
            key: node
            for key, node in host_nodes.NODE_CLASS_MAPPINGS.items()
            if key.startswith("PPCL_")
        }
        host_nodes.NODE_CLASS_MAPPINGS.clear()
        host_nodes.NODE_CLASS_MAPPINGS.update(before)
        return worked, found

    return load


CHANGES = {  # what a later host may have done -> what the user is told of it
    "a class renamed": ("supported_models.QwenImage", "has no QwenImage"),
    "a parameter renamed": ("supported_models_base.BASE.matches", "takes no unet_config"),
    "a function gone": (
        "sd.load_diffusion_model_state_dict",
        "has no load_diffusion_model_state_dict",
    ),
    "blocks built otherwise": ("ldm.qwen_image.model.QwenImageTransformerBlock", "takes no dtype"),
}


@pytest.mark.parametrize(("changed", "told"), CHANGES.values(), ids=CHANGES)
def test_an_unknown_host_is_not_touched(pack, pack_again, monkeypatch, changed, told):
    """Nodes stay, with their widgets, and say which version was tested and which was found."""
    monkeypatch.setattr(comfy.supported_models, "models", stock_models())
    before = list(comfy.supported_models.models)
    if told.startswith("has no"):
        monkeypatch.delattr(f"comfy.{changed}")
    else:
        monkeypatch.setattr(f"comfy.{changed}", lambda other: None)
    worked, found = pack_again()
    assert worked and comfy.supported_models.models == before
    assert found.keys() == {
        key for key in host_nodes.NODE_CLASS_MAPPINGS if key.startswith("PPCL_")
    }
    assert "file" in found["PPCL_LoadModel"].INPUT_TYPES()["required"]
    for node in (found["PPCL_LoadModel"], found["PPCL_Detect"]):
        with pytest.raises(ValueError, match="tested with ComfyUI 0.3.75 to") as error:
            node.execute(anything=1)
        assert told in str(error.value) and "\n" not in str(error.value)


def test_a_host_without_a_module_of_ours_goes_on(pack, pack_again, monkeypatch, caplog):
    """No node can be had then; the host's log says why, in one line, and nothing else happens."""
    monkeypatch.setattr(comfy.supported_models, "models", stock_models())
    before = list(comfy.supported_models.models)
    monkeypatch.setitem(sys.modules, "comfy.patcher_extension", SimpleNamespace())
    with caplog.at_level(logging.WARNING):
        worked, nodes = pack_again()
    assert not worked and comfy.supported_models.models == before
    (line,) = [
        record.message for record in caplog.records if "tested with ComfyUI" in record.message
    ]
    assert "\n" not in line


# without them nothing is imported
AT_IMPORT = {"BASE", "CallbacksMP", "ModelPatcher", "WrappersMP", "manual_cast"}


def test_every_name_of_the_host_is_looked_at(pack, monkeypatch):
    """Whatever the sources call by its full name: where it is gone, nothing is registered, and the
    user is told."""
    sources = [path.read_text() for path in sorted((ROOT / "nodes").rglob("*.py"))]
    used = {
        found for text in sources for found in re.findall(r"\b(comfy(?:\.[a-z_]+)+)\.(\w+)", text)
    }
    used = {
        (module, name)
        for module, name in used
        if module in sys.modules
        and f"{module}.{name}" not in sys.modules
        # what only newer hosts have is called by files that are not imported here
        and hasattr(sys.modules[module], name)
    }
    checks, hosts = pack("host.checks"), pack("host").HOSTS
    assert len(used) > 20 and not list(checks.differences(hosts))
    for module, name in sorted(used):
        if name not in AT_IMPORT:
            with monkeypatch.context() as patch:
                patch.delattr(f"{module}.{name}")
                assert list(checks.differences(hosts)), f"{module}.{name}"


class LaterQwenImage(comfy.supported_models.QwenImage):
    """As a later host may ask for more."""

    @classmethod
    def matches(cls, unet_config, state_dict=None, *, later):
        return True

    def get_model(self, state_dict, prefix="", device=None, *, later):
        return super().get_model(state_dict, prefix, device=device)

    def process_unet_state_dict(self, state_dict, *, later=None):
        self.heard = later
        return state_dict

    def process_unet_state_dict_for_saving(self, state_dict, *, later):
        return state_dict


def test_arguments_of_later_hosts(pack, exported, tmp_path):
    """What a host gives beside what it gives today is passed on."""
    entries, host = pack("host.entries"), pack("host.qwen_image").HOST
    ours = type("PPCLLater", (entries.PrunedConfig, LaterQwenImage), {"host": host})
    tensors = TensorFile(exported(tmp_path, "ppcl", "width", "smallest")).read_all()
    assert ours.matches({}, tensors, later=1)
    config = ours(comfy.model_detection.detect_unet_config(dict(tensors), ""))
    config.set_inference_dtype(torch.float32, None)
    transformer = config.get_model(tensors, "", device=torch.device("cpu"), later=1).diffusion_model
    transformer.load_state_dict(config.process_unet_state_dict(tensors, later=1))
    assert config.heard == 1
    saved = config.process_unet_state_dict_for_saving(transformer.state_dict(), later=1)
    assert saved.keys() == tensors.keys()


def test_callbacks_of_later_hosts(pack, load, bundle, teacher):
    """They take more than is known here."""
    model = load(bundle.name, base=teacher.name)
    pack("host.adapters")._after_load(model, torch.device("cpu"), 0, False, True, "later", later=1)
    pack("host.switching")._follow(model, model.clone(), "later", later=1)


def test_an_error_of_the_hosts_own_class_is_not_ours(pack, monkeypatch):
    """Which may want the tensors that ours does not give it."""
    entries, host = pack("host.entries"), pack("host.qwen_image").HOST
    strict = classmethod(lambda cls, unet_config, state_dict: "img_in.weight" in state_dict)
    later = type("Later", (comfy.supported_models.QwenImage,), {"matches": strict})
    assert type("PPCLLater", (entries.PrunedConfig, later), {"host": host}).matches({}, {}) is False
