"""Where a model's tensors lie, what others leave before their names, and what people give in a
model's place."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from ppcl_engine import open_model
from ppcl_engine.models.folding.reading import open_original
from ppcl_engine.models.weights import Weights
from ppcl_engine.system.tensor_files import write_tensors

from ..tiny.models import comfyui_state

PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "net.",
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "model.diffusion_model._orig_mod.",
)
# the released model's proportions
HEAD_32 = {"attention_head_dim": 32, "axes_dims_rope": [4, 14, 14]}
SMALL = {"max_shard_size": "200KB"}


def same(weights: Weights, model: torch.nn.Module) -> bool:
    state = model.state_dict()
    return set(weights.keys()) == set(state) and all(
        torch.equal(weights.read(key), state[key]) for key in state
    )


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_in_files_and_folders_alike(tmp_path, model, model_config, prefix):
    stored = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    config = json.dumps(model_config(model))
    write_tensors(tmp_path / "a.safetensors", stored, {"config": config})
    (tmp_path / "folder").mkdir()
    write_tensors(tmp_path / "folder" / "model.safetensors", stored)
    (tmp_path / "folder" / "config.json").write_text(config)
    for path in (tmp_path / "a.safetensors", tmp_path / "folder"):
        assert same(Weights(path), model)
    assert (
        open_original(tmp_path / "a.safetensors").read("img_in.weight").shape
        == model.img_in.weight.shape
    )


def test_blocks_that_were_compiled_one_by_one(tmp_path, model, model_config):
    stored = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        stored[
            ".".join([*parts[:2], "_orig_mod", *parts[2:]])
            if parts[0] == "transformer_blocks"
            else name
        ] = tensor
    write_tensors(tmp_path / "a.safetensors", stored, {"config": json.dumps(model_config(model))})
    assert same(Weights(tmp_path / "a.safetensors"), model)
    stored["img_in._orig_mod.weight"] = stored["img_in.weight"]
    write_tensors(tmp_path / "b.safetensors", stored, {"config": json.dumps(model_config(model))})
    with pytest.raises(ValueError, match="img_in._orig_mod.weight are the same tensor"):
        Weights(tmp_path / "b.safetensors")


@pytest.fixture
def folder(tmp_path, model) -> Path:
    model.save_pretrained(tmp_path / "folder", **SMALL)
    return tmp_path / "folder"


def index_of(folder: Path) -> Path:
    return next(folder.glob("*.index.json"))


@pytest.mark.parametrize(
    "name",
    [
        "../outside/x.safetensors",
        "/x.safetensors",
        "C:\\x.safetensors",
        "..\\x.safetensors",
        "",
        "a\0",
    ],
)
def test_an_index_names_files_of_its_folder_alone(folder, name):
    outside = folder.parent / "outside"
    outside.mkdir()
    shutil.copy(next(folder.glob("*.safetensors")), outside / "x.safetensors")
    index = json.loads(index_of(folder).read_text())
    index["weight_map"]["img_in.weight"] = name
    index_of(folder).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="index.json: .* is not a file of weights in its folder"):
        Weights(folder)


def test_links_out_of_the_folder_are_not_followed_but_in_the_hub_s_cache(folder, model):
    shard = sorted(folder.glob("*.safetensors"))[0]
    outside = folder.parent / "elsewhere.safetensors"
    shutil.move(shard, outside)
    shard.symlink_to(outside)
    with pytest.raises(ValueError, match=f"{shard.name}' is not a file of weights in its folder"):
        Weights(folder)
    shard.unlink()
    shutil.move(outside, shard)
    cache = folder.parent / "models--a--b"
    snapshot, blobs = cache / "snapshots" / "1234" / "transformer", cache / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.move(file, blobs / str(number))
        os.symlink(Path("../../../blobs") / str(number), snapshot / file.name)
    assert same(Weights(snapshot), model)


INDEXES = {
    "a list": ("[]", "is not a JSON object"),
    "no weight_map": ("{}", "weight_map is missing"),
    "a word": ('{"weight_map": "x"}', "weight_map is missing or not file names"),
    "numbers": ('{"weight_map": {"a": 1}}', "weight_map is missing or not file names"),
    "nothing": ('{"weight_map": {}}', "weight_map names 0 files"),
    "deep": ('{"weight_map": ' + "[" * 20000 + "]" * 20000 + "}", "nested more than 64 deep"),
    "not text": ("{", "is not a JSON file"),
}


@pytest.mark.parametrize("text, reason", INDEXES.values(), ids=INDEXES)
def test_an_index_that_says_nothing(folder, text, reason):
    index_of(folder).write_text(text)
    with pytest.raises(ValueError, match=f"index.json.*{reason}"):
        Weights(folder)


def test_one_shard_is_not_a_model(folder):
    for shard in sorted(folder.glob("*.safetensors")):
        with pytest.raises(
            ValueError, match=f"{shard.name} is one shard of .*; give the folder that they lie in"
        ):
            open_model(shard)


def test_a_tensor_in_two_shards(folder):
    index_of(folder).unlink()
    write_tensors(folder / "more.safetensors", {"img_in.weight": torch.ones(2)})
    with pytest.raises(ValueError, match="img_in.weight is in .* and in more.safetensors"):
        Weights(folder)


CONFIGS = {
    "a list": ([], "is not a JSON object"),
    "ten million layers": (
        {"num_layers": 10**7},
        "num_layers should be less than or equal to 512, not 10000000",
    ),
    "more layers than blocks": (
        {"num_layers": 400},
        "lacks 394 of 400 blocks, first transformer_blocks.6",
    ),
    "2^63 channels": ({"in_channels": 2**63}, "in_channels should be less"),
    "layers as text": ({"num_layers": "6"}, "num_layers should be a valid integer, not '6'"),
    "nothing for layers": ({"num_layers": None}, "num_layers should be a valid integer, not None"),
    "another width": (
        {"num_attention_heads": 4},
        "its configuration says num_attention_heads 4, its tensors 2",
    ),
    "axes of another size": (
        {"axes_dims_rope": [2, 6, 6]},
        "do not add up to attention_head_dim 16",
    ),
    "a folding that is a list": ({"folding": [1]}, "folding should be an object"),
}


@pytest.mark.parametrize("change, reason", CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_is_checked_before_anything_is_built(folder, change, reason):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change} if change else change))
    with pytest.raises(ValueError, match=f"folder.*{reason}"):
        Weights(folder)


@pytest.mark.parametrize("name", ["num_layers", "in_channels", "joint_attention_dim"])
def test_a_configuration_that_lacks_an_entry(folder, name):
    config = json.loads((folder / "config.json").read_text())
    del config[name]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"the field '{name}' is missing"):
        Weights(folder)


def test_a_configuration_in_metadata(tmp_path, model):
    for config, reason in (
        ("[1]", "is not an object"),
        ("{", "is not JSON"),
        ("[" * 9999, "nested more|is not JSON"),
    ):
        write_tensors(tmp_path / "a.safetensors", model.state_dict(), {"config": config})
        with pytest.raises(ValueError, match=f"a.safetensors: its metadata's config {reason}"):
            Weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize("architecture", ["qwen_image", "flux1", "sd35"], indirect=True)
def test_a_model_without_an_outer_tensor(architecture, tmp_path, make_model, model_config):
    """By diffusers' names with a configuration, by ComfyUI's without: whichever is missing, it is
    named."""
    model = make_model(**(HEAD_32 if architecture.name == "qwen_image" else {}))
    config = {"config": json.dumps(model_config(model))}
    for layout, about in ((model.state_dict(), config), (comfyui_state(architecture, model), None)):
        outer = [name for name in layout if "blocks." not in name]
        assert len(outer) > 5
        for gone in outer:
            write_tensors(
                tmp_path / "a.safetensors", {n: t for n, t in layout.items() if n != gone}, about
            )
            with pytest.raises(
                ValueError, match=r"a.safetensors (looks like .*, but )?(lacks|is named like)"
            ):
                Weights(tmp_path / "a.safetensors")


OTHERS = {
    "a ControlNet": {"controlnet_blocks.0.weight": torch.ones(2)},
    "a LoRA": {"transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(2)},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_has_a_models_names_and_more(tmp_path, model, kind):
    write_tensors(tmp_path / "a.safetensors", model.state_dict() | OTHERS[kind])
    with pytest.raises(ValueError, match=f"a.safetensors is {kind}, not a full model"):
        open_model(tmp_path / "a.safetensors")


NAMES = {
    "a UNet": "model.diffusion_model.input_blocks.0.0.weight",
    "Chroma": "distilled_guidance_layer.in_proj.weight",
    "a text encoder": "model.embed_tokens.weight",
    "a VAE": "decoder.conv_in.weight",
    "Lumina": "noise_refiner.0.attention.qkv.weight",
}


@pytest.mark.parametrize("kind", NAMES)
def test_other_models_are_named(tmp_path, kind):
    write_tensors(tmp_path / "a.safetensors", {NAMES[kind]: torch.ones(2)})
    with pytest.raises(ValueError, match=f"a.safetensors is {kind}.*known: qwen_image, flux1"):
        open_model(tmp_path / "a.safetensors")


@pytest.mark.parametrize("architecture", ["flux1"], indirect=True)
@pytest.mark.parametrize(
    "times, kind",
    [(6, "is FLUX Fill"), (2, "is FLUX Canny or Depth"), (3, "reads more than the picture")],
)
def test_flux_models_that_read_more_than_the_picture(
    architecture, tmp_path, make_model, times, kind
):
    model = make_model(in_channels=16 * times, out_channels=16)
    write_tensors(tmp_path / "a.safetensors", comfyui_state(architecture, model))
    with pytest.raises(
        ValueError, match=f"a.safetensors {kind}.*: {16 * times} channels in, 16 out"
    ):
        open_model(tmp_path / "a.safetensors")


def test_an_index_that_names_what_its_files_do_not_hold(tmp_path, model):
    model.save_pretrained(tmp_path / "sharded", **SMALL)
    path = tmp_path / "sharded" / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["bogus"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names 1 tensors that its files do not hold, first bogus"):
        Weights(tmp_path / "sharded")
