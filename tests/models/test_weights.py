"""Weights in every layout that is found in the wild, and what a bundle adds to its base model."""

import json

import pytest
import torch

from ppcl_engine import open_model
from ppcl_engine.models.stored_layout import as_tensor, object_in, open_layout
from ppcl_engine.models.weights import Weights, parameter_count
from ppcl_engine.system.tensor_files import write_tensors

from ..tiny.tensors import same

# the released model's proportions
HEAD_32 = {"attention_head_dim": 32, "axes_dims_rope": [4, 14, 14]}


def contents(weights: Weights) -> dict[str, torch.Tensor]:
    return {key: weights.read(key) for key in weights.keys()}


def test_opening_a_file_gives_diffusers_own_model(architecture, teacher_file, model, padded_inputs):
    opened = open_model(teacher_file)
    assert type(opened) is type(model) and same(opened.state_dict(), model.state_dict())
    assert not opened.training and not any(p.requires_grad for p in opened.parameters())
    inputs = padded_inputs()
    assert torch.equal(architecture.call(opened, inputs), architecture.call(model, inputs))
    assert parameter_count(opened) == parameter_count(model)


def test_to_check_a_file_the_model_is_built_once(architecture, teacher_file, monkeypatch):
    """Every stage of a run opens its teacher again."""
    Weights(teacher_file)
    monkeypatch.setattr(type(architecture), "build_block", lambda *_: pytest.fail("built again"))
    Weights(teacher_file)


def test_a_comfyui_checkpoint_needs_no_configuration(tmp_path, make_model, model_config):
    model = make_model(**HEAD_32)
    tensors = {f"model.diffusion_model.{n}": t for n, t in model.state_dict().items()}
    write_tensors(
        tmp_path / "a.safetensors", tensors | {"first_stage_model.conv.weight": torch.ones(2)}
    )
    weights = Weights(tmp_path / "a.safetensors")
    assert weights.config | {"zero_cond_t": False} == model_config(model)
    assert same(contents(weights), model.state_dict())


def test_a_sharded_folder(tmp_path, architecture, model, padded_inputs):
    model.save_pretrained(tmp_path / "transformer", max_shard_size="200KB")
    shards = sorted((tmp_path / "transformer").glob("*.safetensors"))
    assert len(shards) > 2
    (tmp_path / "model_index.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "transformer"):
        assert same(contents(Weights(folder)), model.state_dict())
    inputs = padded_inputs()
    assert torch.equal(
        architecture.call(open_model(tmp_path), inputs), architecture.call(model, inputs)
    )
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"lacks the shard {shards[1].name}"):
        Weights(tmp_path)


@pytest.mark.parametrize("config", ["{", "[" * 20_000, "[]", "5"])
def test_a_configuration_in_the_metadata_that_is_none(tmp_path, config):
    write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {"config": config})
    with pytest.raises(ValueError, match=r"a.safetensors: its metadata's config") as error:
        open_layout(tmp_path / "a.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
def test_a_text_in_a_tensor(dtype):
    """Tools that make GGUF of our files keep bytes as numbers."""
    assert object_in(as_tensor({"blocks": 60}).to(dtype), "a file") == {"blocks": 60}
    for wrong in (
        torch.tensor([float("nan")]),
        torch.tensor([float("inf")]),
        torch.tensor([300.0]),
        torch.zeros(2, 2),
        torch.zeros(1),
    ):
        with pytest.raises(ValueError, match="a file: what it says"):
            object_in(wrong, "a file")


def test_folders_without_weights_or_configuration(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        Weights(tmp_path)
    for config in ("[]", "7", '"a"', "null"):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ValueError, match="config.json is not a JSON object"):
            Weights(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no .safetensors or .bin file"):
        Weights(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for content in ("[]", "{}", '{"weight_map": 5}', '{"weight_map": {"a": 5}}'):
        index.write_text(content)
        with pytest.raises(
            ValueError,
            match="is not a JSON object|weight_map is missing or not file names by tensor",
        ):
            Weights(tmp_path)
    index.unlink()
    (tmp_path / "model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="model.bin is truncated or not a PyTorch file"):
        Weights(tmp_path)
    with pytest.raises(ValueError, match="absent does not exist"):
        Weights(tmp_path / "absent")


@pytest.mark.parametrize("suffix", [None, ".scale_weight", ".weight_scale"])
def test_fp8_files(tmp_path, architecture, model, model_config, padded_inputs, suffix):
    state, stored, expected = model.state_dict(), {}, {}
    for name, tensor in state.items():
        if tensor.ndim < 2:
            stored[name] = expected[name] = tensor
            continue
        scale = tensor.abs().max() / 448 if suffix else torch.tensor(1.0)
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        expected[name] = stored[name].float() * scale
        if suffix:
            stored[name.removesuffix(".weight") + suffix] = scale
            stored[name.removesuffix(".weight") + ".scale_input"] = torch.tensor(1.0)
    if suffix == ".scale_weight":
        stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    write_tensors(tmp_path / "a.safetensors", stored, {"config": json.dumps(model_config(model))})
    opened = open_model(tmp_path / "a.safetensors")
    assert same(opened.state_dict(), expected)
    inputs = padded_inputs()
    ours, exact = architecture.call(opened, inputs), architecture.call(model, inputs)
    assert 0 < float((ours - exact).norm() / exact.norm()) < 0.2
    matrix = "transformer_blocks.0.attn.to_q.weight"
    assert Weights(tmp_path / "a.safetensors").read(matrix).dtype == (
        torch.bfloat16 if suffix else torch.float8_e4m3fn
    )


def test_a_foreign_file_lists_what_is_known(tmp_path):
    write_tensors(
        tmp_path / "a.safetensors", {f"double_blocks.{i}.weight": torch.ones(1) for i in range(9)}
    )
    with pytest.raises(
        ValueError, match="known: qwen_image, flux1.*double_blocks.0.weight, double_blocks.1.weight"
    ) as caught:
        open_model(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value) and "double_blocks.8" not in str(caught.value)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_every_tensor_has_a_home(tmp_path, model, model_config, change):
    tensors = dict(model.state_dict())
    name = "transformer_blocks.3.attn.to_k.weight"
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["transformer_blocks.0.lora.weight"] = torch.ones(1)
    else:
        tensors[name] = torch.ones(32, 31)
    write_tensors(tmp_path / "a.safetensors", tensors, {"config": json.dumps(model_config(model))})
    expected = {
        "missing": f"lacks 1 tensors, first {name}",
        "extra": "has 1 tensors that the model does not have, first transformer_blocks.0.lora.weight",
        "shape": rf"{name} has shape \(32, 31\), not \(32, 32\)",
    }
    with pytest.raises(ValueError, match=expected[change]):
        Weights(tmp_path / "a.safetensors")


def test_the_fingerprint_follows_vectors_and_shapes_not_layout(
    tmp_path, model, save_model, make_model, teacher_file
):
    model.save_pretrained(tmp_path / "folder", max_shard_size="200KB")
    mark = Weights(teacher_file).fingerprint
    assert Weights(tmp_path / "folder").fingerprint == mark
    others = [make_model(seed=1), make_model(num_layers=5)]
    marks = {
        Weights(save_model(tmp_path / f"{i}.safetensors", other)).fingerprint
        for i, other in enumerate(others)
    }
    assert len(marks | {mark}) == 3


@pytest.mark.parametrize(
    "stored, wanted, moved_as",
    [
        (torch.float8_e4m3fn, torch.bfloat16, torch.float8_e4m3fn),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_what_is_moved_is_the_smaller_of_what_is_stored_and_what_is_wanted(
    tmp_path, model, model_config, monkeypatch, stored, wanted, moved_as
):
    """To the device "meta", which stands for one that is not the CPU."""
    state = {n: t.to(stored) if t.ndim > 1 else t for n, t in model.state_dict().items()}
    write_tensors(tmp_path / "a.safetensors", state, {"config": json.dumps(model_config(model))})
    weights, moves, to = Weights(tmp_path / "a.safetensors"), [], torch.Tensor.to

    def moving(self, *arguments, **named):
        if "meta" in arguments and not self.is_meta:
            moves.append(self.dtype)
        return to(self, *arguments, **named)

    monkeypatch.setattr(torch.Tensor, "to", moving)
    key = "transformer_blocks.0.img_mlp.net.2.weight"
    moved = weights.read(key, wanted, "meta")
    assert moves == [moved_as] and moved.dtype is wanted and moved.is_meta
    monkeypatch.undo()
    assert torch.equal(weights.read(key, wanted), state[key].to(wanted))
