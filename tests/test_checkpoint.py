"""Weights in every layout that is found in the wild, and what a bundle adds to its base model."""

import json

import pytest
import torch

from ppcl_engine import open_model
from ppcl_engine.bundle import Bundle, is_bundle, write_bundle
from ppcl_engine.checkpoint import Weights, as_tensor, object_in, open_layout, parameter_count
from ppcl_engine.files import TensorEntry, write_tensors
from ppcl_engine.plan import Interval, PruningPlan, Variant
from ppcl_engine.surgery import PassThrough, build_student

HEAD_32 = {"attention_head_dim": 32, "axes_dims_rope": [4, 14, 14]}  # the released model's proportions


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def contents(weights: Weights) -> dict[str, torch.Tensor]:
    return {key: weights.read(key) for key in weights.keys()}


def test_opening_a_file_gives_diffusers_own_model(architecture, teacher_file, model, padded_inputs):
    opened = open_model(teacher_file)
    assert type(opened) is type(model) and same(opened.state_dict(), model.state_dict())
    assert not opened.training and not any(p.requires_grad for p in opened.parameters())
    inputs = padded_inputs()
    assert torch.equal(architecture.call(opened, inputs), architecture.call(model, inputs))
    assert parameter_count(opened) == parameter_count(model)


def test_a_comfyui_checkpoint_needs_no_configuration(tmp_path, make_model, model_config):
    model = make_model(**HEAD_32)
    tensors = {f"model.diffusion_model.{n}": t for n, t in model.state_dict().items()}
    write_tensors(tmp_path / "a.safetensors", tensors | {"first_stage_model.conv.weight": torch.ones(2)})
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
    assert torch.equal(architecture.call(open_model(tmp_path), inputs), architecture.call(model, inputs))
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"lacks the shard {shards[1].name}"):
        Weights(tmp_path)


@pytest.mark.parametrize("config", ["{", "[" * 20_000, "[]", "5"])
def test_a_configuration_in_the_metadata_that_is_none(tmp_path, config):
    write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {"config": config})
    with pytest.raises(ValueError, match=r"a.safetensors: .*configuration") as error:
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
        with pytest.raises(ValueError, match="config.json: a configuration is a JSON object"):
            Weights(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no .safetensors or .bin file"):
        Weights(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for content in ("[]", "{}", '{"weight_map": 5}', '{"weight_map": {"a": 5}}'):
        index.write_text(content)
        with pytest.raises(ValueError, match="does not say which file holds which tensor"):
            Weights(tmp_path)
    index.unlink()
    (tmp_path / "model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="model.bin is truncated or no PyTorch file"):
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
    assert Weights(tmp_path / "a.safetensors").read(matrix).dtype == (torch.bfloat16 if suffix else torch.float8_e4m3fn)


def test_a_foreign_file_lists_what_is_known(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {f"double_blocks.{i}.weight": torch.ones(1) for i in range(9)})
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
        "extra": "has 1 tensors with no home, first transformer_blocks.0.lora.weight",
        "shape": rf"{name} has shape \(32, 31\), not \(32, 32\)",
    }
    with pytest.raises(ValueError, match=expected[change]):
        Weights(tmp_path / "a.safetensors")


def test_the_fingerprint_follows_vectors_and_shapes_not_layout(tmp_path, model, save_model, make_model, teacher_file):
    model.save_pretrained(tmp_path / "folder", max_shard_size="200KB")
    mark = Weights(teacher_file).fingerprint
    assert Weights(tmp_path / "folder").fingerprint == mark
    others = [make_model(seed=1), make_model(num_layers=5)]
    marks = {Weights(save_model(tmp_path / f"{i}.safetensors", other)).fingerprint for i, other in enumerate(others)}
    assert len(marks | {mark}) == 3


def kept_blocks(model: torch.nn.Module) -> list[int]:
    return [index for index, block in enumerate(model.transformer_blocks) if not isinstance(block, PassThrough)]


def student_entries(states: dict[str, dict[str, torch.Tensor]]) -> list[TensorEntry]:
    return [
        TensorEntry(f"students.{name}.{key}", tensor.dtype, tuple(tensor.shape), lambda t=tensor: t)
        for name, state in states.items()
        for key, tensor in state.items()
    ]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, architecture, teacher_file):
    """Random students for 1-2 (plain), 3-4 (affine): path, plan, students by name."""
    weights = Weights(teacher_file)
    plan = PruningPlan(
        architecture=architecture.name,
        config=weights.config,
        num_blocks=6,
        fingerprint=weights.fingerprint,
        intervals=(Interval(first=1, last=2), Interval(first=3, last=5, correction="4")),
        variants=(Variant(name="small", intervals=("1-2", "3-5"), parameters=1),),
    )
    torch.manual_seed(5)
    students = {i.name: build_student(architecture, weights.config, i).requires_grad_(False) for i in plan.intervals}
    path = tmp_path_factory.mktemp("bundle") / "a.ppcl.safetensors"
    write_bundle(path, plan, student_entries({name: student.state_dict() for name, student in students.items()}))
    return path, plan, students


def test_a_bundle_there_and_back(bundle, teacher_file):
    path, plan, students = bundle
    read = Bundle(path)
    assert read.plan == plan and is_bundle(path) and not is_bundle(teacher_file)
    for interval in plan.intervals:
        assert same(read.student(interval, torch.float32, "cpu").state_dict(), students[interval.name].state_dict())
    assert sum(t.numel() for s in students.values() for t in s.parameters()) * 4 < path.stat().st_size


def test_full_is_the_teacher_bit_for_bit(architecture, bundle, teacher_file, model, padded_inputs):
    inputs = padded_inputs()
    opened = open_model(bundle[0], "full", teacher_file)
    assert same(opened.state_dict(), model.state_dict())
    assert torch.equal(architecture.call(opened, inputs), architecture.call(model, inputs))


@pytest.mark.parametrize(
    "variant, kept", [("1-2", [0, 1, 3, 4, 5]), ("3-5", [0, 1, 2, 3]), (None, [0, 1, 3]), ("small", [0, 1, 3])]
)
def test_a_variant_runs_students_in_place_of_its_intervals(
    architecture, bundle, teacher_file, model, padded_inputs, variant, kept
):
    path, plan, students = bundle
    opened, inputs = open_model(path, variant, teacher_file), padded_inputs()
    assert kept_blocks(opened) == kept and opened.config.num_layers == 6
    chosen = plan.variant(variant).intervals
    state = architecture.embed(model, inputs)
    for index in kept:
        name = next((n for n in chosen if n.startswith(f"{index}-")), None)
        state = architecture.run_block(students[name] if name else model.transformer_blocks[index], state)
    ours = architecture.call(opened, inputs)
    assert torch.equal(ours, architecture.finish(model, state))
    assert not torch.allclose(ours, architecture.call(model, inputs), atol=1e-2)


def test_an_interval_given_back_is_the_teacher_there(bundle, teacher_file, model):
    opened = open_model(bundle[0], "3-5", teacher_file)
    for index in (0, 1, 2):
        assert same(opened.transformer_blocks[index].state_dict(), model.transformer_blocks[index].state_dict())


def test_students_that_copy_the_teacher_where_the_rest_is_identity(
    tmp_path, architecture, make_model, save_model, padded_inputs
):
    """Blocks whose gates are zero do nothing, so a copy of the block before them replaces the whole interval."""
    model = make_model(seed=2)
    for index in (2, 3):
        for linear in (model.transformer_blocks[index].img_mod[1], model.transformer_blocks[index].txt_mod[1]):
            linear.weight.zero_(), linear.bias.zero_()
    base = save_model(tmp_path / "base.safetensors", model)
    weights = Weights(base)
    plan = PruningPlan(
        architecture=architecture.name,
        config=weights.config,
        num_blocks=6,
        fingerprint=weights.fingerprint,
        intervals=(Interval(first=1, last=3),),
    )
    write_bundle(tmp_path / "a", plan, student_entries({"1-3": model.transformer_blocks[1].state_dict()}))
    opened, inputs = open_model(tmp_path / "a", base=base), padded_inputs()
    assert kept_blocks(opened) == [0, 1, 4, 5]
    assert torch.equal(architecture.call(opened, inputs), architecture.call(model, inputs))


def test_a_bundle_wants_its_own_base(tmp_path, bundle, teacher_file, make_model, save_model):
    path = bundle[0]
    with pytest.raises(ValueError, match="is a bundle: students only; give the base model"):
        open_model(path)
    other = save_model(tmp_path / "other.safetensors", make_model(seed=1))
    with pytest.raises(ValueError, match="other.safetensors .*is not the teacher of this plan"):
        open_model(path, base=other)
    with pytest.raises(ValueError, match="is not a bundle, so it has no variant 'small'"):
        open_model(teacher_file, "small")
    for variant in (None, "small"):
        with pytest.raises(ValueError, match="no.ppcl.safetensors does not exist; give a model file or folder$"):
            open_model(tmp_path / "no.ppcl.safetensors", variant, teacher_file)
    with pytest.raises(ValueError, match="'huge' is not in the plan; it has: small, full"):
        open_model(path, "huge", teacher_file)
    with pytest.raises(ValueError, match="holds no pruning plan"):
        Bundle(teacher_file)


def test_a_bundle_that_lacks_a_tensor_says_so(tmp_path, bundle):
    path, plan, _ = bundle
    file = Bundle(path).file
    tensors = {n: t for n, t in file.read_all().items() if n != "students.1-2.attn.to_q.bias"}
    write_tensors(tmp_path / "a", tensors, file.metadata)
    with pytest.raises(ValueError, match="student 1-2: tensor attn.to_q.bias is missing"):
        Bundle(tmp_path / "a").student(plan.intervals[0], torch.float32, "cpu")
