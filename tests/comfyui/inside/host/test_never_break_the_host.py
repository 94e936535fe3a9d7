"""The host finds every other model as it would without this pack, whatever a file holds, and also
where it is not as known."""

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

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "num_heads": -1,
    "num_head_channels": 64,
}
UNET |= {"use_spatial_transformer": True}
SD = UNET | {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1] * 9 + [0] * 3,
}
SDXL = UNET | {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "num_classes": "sequential",
}
DOUBLE_STREAM = {
    "in_channels": 16,
    "out_channels": 16,
    "hidden_size": 3072,
    "mlp_ratio": 4.0,
    "num_heads": 24,
    "depth": 2,
    "depth_single_blocks": 3,
    "axes_dim": [16, 56, 56],
    "qkv_bias": True,
}
FLUX = DOUBLE_STREAM | {"vec_in_dim": 768, "context_in_dim": 4096, "theta": 10000, "patch_size": 2}
HUNYUAN = DOUBLE_STREAM | {
    "vec_in_dim": 768,
    "context_in_dim": 4096,
    "theta": 256,
    "patch_size": [1, 2, 2],
}
HUNYUAN |= {
    "guidance_embed": True,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
}
CHROMA = DOUBLE_STREAM | {"context_in_dim": 4096, "theta": 10000, "patch_size": 2}
CHROMA |= {"in_dim": 64, "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5}
Z_IMAGE = {
    "n_layers": 3,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "axes_dims": [32, 48, 48],
}
Z_IMAGE |= {
    "axes_lens": [1536, 512, 512],
    "cap_feat_dim": 2560,
    "z_image_modulation": True,
    "qk_norm": True,
}
Z_IMAGE |= {"in_channels": 16, "patch_size": 2, "ffn_dim_multiplier": 8 / 3}
# what a class's constructor asks for beyond its defaults and what the config class says itself
ASKED = {
    "SD15": SD,
    "SD15_instructpix2pix": SD | {"in_channels": 8},
    "SD20": SD,
    "SD21UnclipL": SD | {"num_classes": "sequential"},
    "SDXL": SDXL,
    "SDXL_instructpix2pix": SDXL | {"in_channels": 8},
    "Flux": FLUX | {"txt_ids_dims": []},
    "FluxInpaint": FLUX | {"in_channels": 96, "txt_ids_dims": []},
    "FluxSchnell": FLUX | {"txt_ids_dims": []},
    "Flux2": FLUX
    | {
        "in_channels": 128,
        "out_channels": 128,
        "hidden_size": 6144,
        "num_heads": 48,
        "mlp_ratio": 3.0,
        "vec_in_dim": None,
        "context_in_dim": 15360,
        "axes_dim": [32] * 4,
        "patch_size": 1,
        "qkv_bias": False,
        "ops_bias": False,
        "guidance_embed": True,
        "global_modulation": True,
        "mlp_silu_act": True,
        "txt_ids_dims": [3],
    },
    "HunyuanVideo": HUNYUAN | {"vision_in_dim": None, "meanflow_sum": False},
    "HunyuanVideoI2V": HUNYUAN | {"in_channels": 33, "vision_in_dim": None, "meanflow_sum": False},
    "HunyuanImage21": HUNYUAN
    | {"patch_size": [1, 1], "axes_dim": [64, 64], "vision_in_dim": None, "meanflow_sum": False},
    "Chroma": CHROMA | {"txt_ids_dims": [], "vec_in_dim": None},
    "ZImage": Z_IMAGE,
    "Lumina2": Z_IMAGE
    | {
        "dim": 2304,
        "n_heads": 24,
        "n_kv_heads": 8,
        "axes_dims": [32] * 3,
        "z_image_modulation": False,
    },
}
SMALL = {
    "Flux": {"depth": 1, "depth_single_blocks": 1},
    "WAN21_T2V": {"dim": 128, "ffn_dim": 256, "num_heads": 1, "num_layers": 2},
}
# half a minute each: they fill their weights while they are built
SLOW = {"Stable_Cascade_C", "Stable_Cascade_B"}
MUST = {
    "0.3.75": {
        "SD15",
        "SDXL",
        "Flux",
        "WAN21_T2V",
        "HunyuanVideo",
        "LTXV",
        "Lumina2",
        "QwenImage",
        "SD3",
        "AuraFlow",
    },
    "0.30.0": {"Flux2", "ZImage", "Krea2", "Chroma", "WAN22_T2V", "HunyuanImage21"},
}
MUST["0.30.0"] |= MUST["0.3.75"]
LATER = {"txt_ids_dims", "meanflow_sum"}  # 0.3.75 does not know them


def stock_models() -> list[type]:
    """The host's own classes, without this pack's."""
    return [
        known for known in comfy.supported_models.models if not known.__name__.startswith("PPCL")
    ]


def empty_tensors(known: type) -> dict[str, torch.Tensor]:
    """Names and shapes of the class's transformer or U-Net, on the meta device, without weights."""
    config = known({**ASKED.get(known.__name__, {}), **known.unet_config})
    for name in LATER & config.unet_config.keys() if not recent() else ():
        del config.unet_config[name]
    config.set_inference_dtype(torch.float32, None)
    with torch.device("meta"):
        return config.get_model({}, "", device=torch.device("meta")).diffusion_model.state_dict()


def recent() -> bool:
    return any(known.__name__ == "Krea2" for known in stock_models())


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
        if module in sys.modules and f"{module}.{name}" not in sys.modules
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
