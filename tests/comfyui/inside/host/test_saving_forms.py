"""Saving models of other forms: folded, released, sparse, quantised, partly loaded; and names that
hosts spell otherwise."""

from __future__ import annotations

import json

import comfy.model_management
import comfy.utils
import pytest
import torch

from ppcl_engine.architectures import architecture_named
from ppcl_engine.models.stored_layout import COMFYUI_PREFIX, STRUCTURE_TENSOR
from ppcl_engine.settings.convert_settings import FoldConfig
from ppcl_engine.stages.convert.fold import fold
from ppcl_engine.system.float8 import FP8_MARK
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ....tiny.released_models import KEPT, LISTS, TEACHER_BLOCKS, released_state
from ..conftest import BOUND
from ..forwards import relative_error

TOLERANCE = 1e-4
# hosts that keep a quantised weight in a tensor of its own kind
NEWER = hasattr(comfy.utils, "convert_old_quants")
RELEASED = {
    "in_channels": 64,
    "out_channels": 16,
    "attention_head_dim": 32,
    "axes_dims_rope": [4, 14, 14],
}
FLUX = pytest.mark.parametrize("architecture", ["flux1"], indirect=True)


@pytest.fixture
def with_lora(models, run_node, teacher):
    """A MODEL with a change of these modules, of the host's names."""

    def change(model, *modules: str, strength: float = 0.7):
        generator, stored = torch.Generator().manual_seed(4), {}
        shapes = {n: t.shape for n, t in model.model.diffusion_model.state_dict().items()}
        for module in modules:
            out, into = shapes[f"{module}.weight"]
            into = into if into in (32, 160) else 32  # of a folded map the whole one's
            stored[f"diffusion_model.{module}.lora_A.weight"] = (
                torch.randn(2, into, generator=generator) / into**0.5
            )
            stored[f"diffusion_model.{module}.lora_B.weight"] = torch.randn(
                out, 2, generator=generator
            )
        write_tensors(models.loras / "form.safetensors", stored)
        return run_node(
            "LoraLoaderModelOnly",
            model=model,
            lora_name="form.safetensors",
            strength_model=strength,
        )[0]

    return change


MODULATIONS = [
    f"transformer_blocks.{index}.{name}_mod.1" for index in (0, 3) for name in ("img", "txt")
]


@pytest.mark.parametrize(
    ("variant", "switchable"), [("full", True), ("smallest", True), ("smallest", False)]
)
def test_a_folded_basis(
    saved, opened, load, with_lora, velocity, bundle, teacher, loose_bound, variant, switchable
):
    whole = load(
        bundle.name, base=teacher.name, variant=variant, switchable=switchable, fold="basis"
    )
    there = whole.model.diffusion_model.state_dict()
    model = with_lora(
        whole, *(name for name in MODULATIONS if len(there.get(f"{name}.weight", ())) == 192)
    )
    path, expected = saved(model), velocity(model)
    assert relative_error(velocity(whole), expected) > 0.01
    for name, actual in opened(path).items():
        assert relative_error(actual, expected) < TOLERANCE, name


def test_a_table_of_the_schedules_so_far_is_refused(saved, load, drawn, bundle, teacher):
    model = load(bundle.name, base=teacher.name, fold="table")
    for _ in range(2):
        with pytest.raises(
            ValueError, match="folded into a table of the schedules .* set fold to off or basis"
        ) as error:
            saved(model)
        assert "\n" not in str(error.value)
        drawn(model)


def test_a_table_that_came_in_a_file(saved, load, with_lora, drawn, teacher, models, tmp_path):
    """Draws what it drew, with the LoRA in its values; the unfolded file, which has none, adds no
    timesteps to it."""
    path = fold(
        FoldConfig(
            path=teacher,
            form="table",
            run=tmp_path,
            dtype="float32",
            host="comfyui",
            bound=BOUND,
            name="table_to_save",
            device="cpu",
            timesteps="1 0.6667 0.3333",
        )
    )
    path = path.replace(models.diffusion_models / path.name)
    whole = load(path.name, base=teacher.name)
    without = drawn(whole)
    model = with_lora(whole, *MODULATIONS)
    expected = drawn(model)
    assert relative_error(without, expected) > 0.01
    again = saved(model)
    assert relative_error(drawn(load(again.name)), expected) < TOLERANCE
    with pytest.raises(ValueError, match="was not folded from"):
        load(again.name, base=teacher.name)


def test_what_folded_modulations_cannot_follow_is_refused(
    saved, load, with_lora, bundle, teacher, loose_bound
):
    model = load(bundle.name, base=teacher.name, fold="basis")
    changed = with_lora(model, "time_text_embed.timestep_embedder.linear_2")
    with pytest.raises(ValueError, match="which folded modulations can't follow; set fold to off"):
        saved(changed)
    saved(model)


@pytest.fixture(scope="module")
def released(models, make_model):
    """A single file of the authors' layout, with these lists."""
    big = make_model(num_layers=TEACHER_BLOCKS, **RELEASED)

    def make(name: str, **lists: list[int]) -> str:
        path = models.diffusion_models / f"to_save_{name}.safetensors"
        write_tensors(path, released_state(big, KEPT, {**LISTS, **lists}))
        return path.name

    return make


STEPS = {"given": {}, "missing": {"ehs_proj_index": []}}


@pytest.mark.parametrize(
    ("steps", "legacy"), [("given", False), ("given", True), ("missing", False)]
)
def test_a_released_model(saved, opened, released, load, velocity, steps, legacy):
    """By the teacher's numbers that the user gave, in the layout of our own files."""
    name = released(steps, **STEPS[steps])
    model = load(name, legacy_text=legacy, preset="by intervals", intervals="1-2 5-6")
    path, expected = saved(model), velocity(model)
    assert COMFYUI_PREFIX + STRUCTURE_TENSOR in TensorFile(path).keys()
    for loader, actual in opened(path).items():
        assert relative_error(actual, expected) < TOLERANCE, loader
    blocks = load(path.name).model.diffusion_model.transformer_blocks
    assert [n for n, block in enumerate(blocks) if list(block.parameters())] == KEPT


def test_a_released_model_that_no_plan_describes_is_refused(saved, released, load):
    name = released("inside", single_stream_index=[1, 2], ehs_proj_index=[1, 2], ffn_proj_index=[])
    with pytest.raises(
        ValueError, match="moves the text on inside a text group, at block 1"
    ) as error:
        saved(load(name))
    assert "\n" not in str(error.value)


def test_an_edit_models_mark_stays(saved, load, velocity, models, teacher):
    mark = next(iter(architecture_named("qwen_image").marks))
    file = models.diffusion_models / "edit_to_save.safetensors"
    config = json.dumps({**json.loads(TensorFile(teacher).metadata["config"]), "zero_cond_t": True})
    write_tensors(file, TensorFile(teacher).read_all() | {mark: torch.empty(0)}, {"config": config})
    model = load(file.name)
    path = saved(model)
    assert COMFYUI_PREFIX + mark in TensorFile(path).keys()
    again = load(path.name)
    configs = [m.model.diffusion_model.ppcl.structure.config for m in (model, again)]
    assert configs[0] == configs[1] and configs[0]["zero_cond_t"]
    assert torch.equal(velocity(again), velocity(model))


@pytest.fixture(scope="module")
def fp8_base(models, host_tensors) -> str:
    """Matrices in scaled fp8."""
    tensors = {FP8_MARK: torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in host_tensors.items():
        if tensor.ndim == 2:
            scale = tensor.abs().max() / 448
            tensors |= {
                name: (tensor / scale).to(torch.float8_e4m3fn),
                name.removesuffix("weight") + "scale_weight": scale,
            }
        else:
            tensors[name] = tensor
    write_tensors(models.diffusion_models / "fp8_to_save.safetensors", tensors)
    return "fp8_to_save.safetensors"


@FLUX
def test_a_model_in_fp8_stays_so(
    saved, load, with_lora, velocity, engine_velocity, bundle, teacher, fp8_base, caplog
):
    """In as many bytes, halved modulations too, and with a LoRA in it."""
    options = {"base": fp8_base, "variant": "smallest", "weight_dtype": "default"}
    whole = load(bundle.name, **options)
    model = with_lora(
        whole,
        "double_blocks.1.img_attn.qkv",
        "single_blocks.2.linear2",
        "double_blocks.0.txt_mod.lin",
    )
    path, expected = saved(model), velocity(model)
    assert relative_error(velocity(whole), expected) > 0.01
    file, name = TensorFile(path), f"{COMFYUI_PREFIX}double_blocks.0.txt_mod.lin.weight"
    assert file.dtype(name) == torch.float8_e4m3fn and file.shape(name) == (96, 32)
    caplog.clear()
    again = load(path.name, weight_dtype="default")
    assert relative_error(velocity(again), expected) < TOLERANCE
    assert relative_error(engine_velocity(path), expected) < TOLERANCE
    assert not [line for line in caplog.messages if "missing" in line or "unexpected" in line]


@pytest.mark.skipif(not NEWER, reason="this host patches all weights before it saves them")
@FLUX
def test_partly_loaded(saved, load, with_lora, velocity, bundle, teacher, pack, monkeypatch):
    """A newer host patches what stays off the device when it is written; students too, and what is
    cut."""
    model = load(bundle.name, base=teacher.name, variant="smallest")
    model = with_lora(
        model,
        "double_blocks.1.img_attn.qkv",
        "single_blocks.1.linear1",
        "double_blocks.0.txt_mod.lin",
    )
    load_whole = comfy.model_management.load_models_gpu

    def load_partly(models, **named):
        for found in models:
            found.load(torch.device("cpu"), lowvram_model_memory=20_000, **named)

    with monkeypatch.context() as patched:
        model.patch_model(load_weights=False)
        patched.setattr(comfy.model_management, "load_models_gpu", load_partly)
        path = saved(model)
        assert model.model.lowvram_patch_counter > 1
    model.unpatch_model(torch.device("cpu"))
    assert load_whole is comfy.model_management.load_models_gpu
    assert relative_error(velocity(load(path.name)), velocity(model)) < TOLERANCE


def other_spelling(name: str) -> str:
    """FLUX' norms as newer hosts have them."""
    return name.removesuffix("scale") + "weight" if name.endswith("_norm.scale") else name


@FLUX
def test_both_spellings_of_names(
    load, run_node, velocity, engine_velocity, bundle, teacher, exported, host_tensors, models
):
    """As a base, as a full model, counted anew: a host of either kind may have saved it."""
    expected = engine_velocity(bundle, "smallest", teacher)
    spelled = {other_spelling(name): tensor for name, tensor in host_tensors.items()}
    assert spelled.keys() != host_tensors.keys()
    base = models.diffusion_models / "spelled.safetensors"
    write_tensors(base, spelled, TensorFile(teacher).metadata)
    for switchable in (True, False):
        model = load(bundle.name, base=base.name, variant="smallest", switchable=switchable)
        assert relative_error(velocity(model), expected) < TOLERANCE
    assert relative_error(engine_velocity(bundle, "smallest", base), expected) < TOLERANCE
    for layout, variant in (("comfyui", "9-10"), ("ppcl", "smallest")):
        path = exported(models.diffusion_models, layout, f"spelled_{layout}", variant)
        expected, file = engine_velocity(path), TensorFile(path)
        write_tensors(
            path, {other_spelling(n): t for n, t in file.read_all().items()}, file.metadata
        )
        models_of_it = [load(path.name)]
        if NEWER:  # an older host knows no FLUX by these names
            models_of_it += run_node("UNETLoader", unet_name=path.name, weight_dtype="default")
        for actual in (*map(velocity, models_of_it), engine_velocity(path)):
            assert relative_error(actual, expected) < TOLERANCE


@pytest.mark.skipif(NEWER, reason="newer hosts write it")
@FLUX
def test_mixed_precision_that_this_host_cannot_write(
    saved, run_node, models, host_tensors, teacher
):
    """One map in fp8, named in the metadata: ComfyUI 0.3.75 puts an object between the tensors that
    it saves."""
    name, path = "double_blocks.0.img_mlp.0", models.diffusion_models / "mixed.safetensors"
    scale = host_tensors[f"{name}.weight"].abs().max() / 448
    quantised = {f"{name}.weight": (host_tensors[f"{name}.weight"] / scale).to(torch.float8_e4m3fn)}
    said = json.dumps({"format_version": "1.0", "layers": {name: {"format": "float8_e4m3fn"}}})
    metadata = TensorFile(teacher).metadata | {"_quantization_metadata": said}
    write_tensors(path, host_tensors | quantised | {f"{name}.weight_scale": scale}, metadata)
    (model,) = run_node("UNETLoader", unet_name=path.name, weight_dtype="default")
    with pytest.raises(ValueError, match="cannot save a model of mixed precision") as error:
        saved(model)
    assert "\n" not in str(error.value)


@FLUX
def test_a_merge_of_two_branches(
    saved, opened, load, run_node, with_lora, velocity, bundle, teacher
):
    """By the host's node, which patches every weight, students' and projections' too: half of a
    LoRA."""
    model = load(bundle.name, base=teacher.name, variant="smallest")
    changed = ("double_blocks.1.img_attn.qkv", "single_blocks.3.linear2")
    other, expected = (
        with_lora(model, *changed),
        velocity(with_lora(model, *changed, strength=0.35)),
    )
    (merged,) = run_node("ModelMergeSimple", model1=model, model2=other, ratio=0.5)
    path = saved(merged)
    assert (
        relative_error(velocity(merged), expected)
        < TOLERANCE
        < 0.001
        < relative_error(velocity(model), expected)
    )
    for name, actual in opened(path).items():
        assert relative_error(actual, expected) < TOLERANCE, name
