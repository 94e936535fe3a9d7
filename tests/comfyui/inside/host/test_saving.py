"""What the host's own Save nodes write of a pruned model loads again: in our loader, in the host's
with and without the pack, in the engine. Forms of one architecture alone are in
`test_saving_forms.py`."""

from __future__ import annotations

import json
from contextlib import contextmanager

import comfy.model_detection
import comfy.sd
import pytest
import torch
from comfy.sd1_clip import SD1ClipModel, SD1Tokenizer, SDClipModel
from comfy.taesd.taesd import TAESD

from ppcl_engine.models.stored_layout import COMFYUI_PREFIX, HINTS_TENSOR, STRUCTURE_TENSOR
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ..forwards import relative_error
from ..loading.test_stock_host import without_the_pack

TOLERANCE = 1e-4
PLAIN = {"qwen_image": "3-4", "flux1": "9-10", "sd35": "4-5"}  # an interval without a correction
DEPTHS = ("num_layers", "depth", "depth_single_blocks", "num_blocks")  # what a stock host counts
pytestmark = pytest.mark.parametrize("architecture", [*PLAIN], indirect=True)


@pytest.fixture
def named(architecture):
    """A variant of the bundle: "plain" is one of whole blocks."""
    return lambda name: PLAIN[architecture.name] if name == "plain" else name


@pytest.fixture(scope="module")
def lora(models, host_tensors, host_case) -> str:
    """A change of every matrix of every block."""
    generator, stored = torch.Generator().manual_seed(3), {}
    for name, tensor in host_tensors.items():
        if "blocks." in name and tensor.ndim == 2:
            module, (out, into) = name.removesuffix(".weight"), tensor.shape
            stored[f"diffusion_model.{module}.lora_A.weight"] = (
                torch.randn(2, into, generator=generator) / into**0.5
            )
            stored[f"diffusion_model.{module}.lora_B.weight"] = 0.3 * torch.randn(
                out, 2, generator=generator
            )
    path = models.loras / f"{host_case.file}_saved.safetensors"
    write_tensors(path, stored)
    return path.name


def content_of(path) -> dict[str, torch.Tensor]:
    """The transformer's tensors; those that describe it are parsed from JSON."""
    found = {
        name.removeprefix(COMFYUI_PREFIX): tensor
        for name, tensor in TensorFile(path).read_all().items()
    }
    said = {
        n: json.loads(bytes(found[n].tolist()))
        for n in (STRUCTURE_TENSOR, HINTS_TENSOR)
        if n in found
    }
    return found | said


def check_alike(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (
            torch.equal(actual[name], value)
            if isinstance(value, torch.Tensor)
            else actual[name] == value
        ), name


@pytest.mark.parametrize(
    ("variant", "switchable"),
    [("full", True), ("plain", True), ("smallest", True), ("plain", False), ("smallest", False)],
)
def test_a_variant_is_as_exported(
    saved, opened, load, velocity, exported, bundle, teacher, named, tmp_path, variant, switchable
):
    model = load(bundle.name, base=teacher.name, variant=named(variant), switchable=switchable)
    path, expected = saved(model), velocity(model)
    layout = "comfyui" if variant in ("full", "plain") else "ppcl"
    check_alike(
        content_of(path), content_of(exported(tmp_path, layout, "exported", named(variant)))
    )
    for name, actual in opened(path).items():
        assert relative_error(actual, expected) < TOLERANCE, name


@pytest.mark.parametrize("loader", ["ours", "host"])
def test_a_file_counted_anew_stays_as_it_is(
    saved, load, run_node, exported, models, named, host_case, loader
):
    path = exported(models.diffusion_models, "comfyui", f"{host_case.file}_to_save", named("plain"))
    if loader == "ours":
        model = load(path.name)
    else:
        (model,) = run_node("UNETLoader", unet_name=path.name, weight_dtype="default")
    actual, expected = content_of(saved(model)), content_of(path)
    for content in (actual, expected):
        content[HINTS_TENSOR]["config"].pop("sample_size", None)  # which nothing in a file tells
    check_alike(actual, expected)


def test_a_file_with_a_plan_stays_as_it_is(saved, load, exported, models, host_case):
    path = exported(models.diffusion_models, "ppcl", f"{host_case.file}_to_save_too", "smallest")
    check_alike(content_of(saved(load(path.name))), content_of(path))


@pytest.mark.parametrize(
    ("variant", "switchable", "first"),
    [("small", True, "saved"), ("smallest", True, "sampled"), ("smallest", False, "saved")],
)
def test_a_lora_is_in_it(
    saved, opened, load, run_node, velocity, bundle, teacher, lora, variant, switchable, first
):
    """In the students' weights too, whatever the model was used for before, and saving changes
    nothing of it."""
    whole = load(bundle.name, base=teacher.name, variant=variant, switchable=switchable)
    (model,) = run_node("LoraLoaderModelOnly", model=whole, lora_name=lora, strength_model=0.7)
    before = velocity(model) if first == "sampled" else None
    path, expected = saved(model), velocity(model)
    assert before is None or torch.equal(before, expected)
    assert relative_error(velocity(whole), expected) > 10 * TOLERANCE
    for name, actual in opened(path).items():
        assert relative_error(actual, expected) < TOLERANCE, name


def test_a_lora_of_the_teacher_fits_what_was_saved(
    saved, load, run_node, velocity, bundle, teacher, lora, named
):
    """Whose blocks are counted anew: in both loaders each finds the LoRA's own."""
    model = load(bundle.name, base=teacher.name, variant=named("plain"))
    path = saved(model)
    (stock,) = run_node("UNETLoader", unet_name=path.name, weight_dtype="default")
    found = []
    for loaded in (model, load(path.name), stock):
        (patched,) = run_node(
            "LoraLoaderModelOnly", model=loaded, lora_name=lora, strength_model=0.7
        )
        found.append(velocity(patched))
    assert (
        relative_error(found[1], found[0]) < TOLERANCE
        and relative_error(found[2], found[0]) < TOLERANCE
    )


def test_branches_of_one_model(saved, load, switched, velocity, bundle, teacher, named):
    """Each as it runs, whichever was used last."""
    whole = load(bundle.name, base=teacher.name, variant="full")
    branches = [switched(whole, variant=name) for name in ("smallest", named("plain"), "full")]
    expected = [velocity(branch) for branch in branches]
    paths = [saved(branch) for branch in branches]
    for path, velocities in zip(paths, expected, strict=True):
        assert relative_error(velocity(load(path.name)), velocities) < TOLERANCE


@contextmanager
def stock_host(host, monkeypatch):
    """Without the pack; it takes a width for granted and knows no small models, so it is told
    theirs. Blocks it counts."""
    detect = comfy.model_detection.detect_unet_config

    def with_sizes(state_dict, *arguments, **named):
        detected = detect(state_dict, *arguments, **named)
        return detected | {name: size for name, size in host.items() if name not in DEPTHS}

    with without_the_pack(), monkeypatch.context() as patched:
        patched.setattr(comfy.model_detection, "detect_unet_config", with_sizes)
        yield


def test_without_the_pack(
    saved, load, run_node, velocity, bundle, teacher, named, architecture, monkeypatch, caplog
):
    """What is of whole blocks draws the same there (not SD3.5, of which the host takes the number
    of blocks from the width); what is not is refused."""
    model = load(bundle.name, base=teacher.name, variant=named("plain"))
    structure = model.model.diffusion_model.ppcl.structure
    sizes, expected, plain = (
        structure.host.arguments(structure.config),
        velocity(model),
        saved(model),
    )
    refused = [saved(load(bundle.name, base=teacher.name, variant="smallest"))]
    with stock_host(sizes, monkeypatch):
        if architecture.name == "sd35":
            refused.append(plain)
        else:
            caplog.clear()
            (stock,) = run_node("UNETLoader", unet_name=plain.name, weight_dtype="default")
            assert not hasattr(stock.model.diffusion_model, "ppcl")
            assert relative_error(velocity(stock), expected) < TOLERANCE
            assert not [line for line in caplog.messages if "unet missing" in line]
        for path in refused:
            with pytest.raises(RuntimeError, match="size mismatch"):
                run_node("UNETLoader", unet_name=path.name, weight_dtype="default")


@pytest.fixture(scope="module")
def beside():
    """A small text encoder and a small VAE, of the host's own classes."""
    sizes = {
        "hidden_act": "quick_gelu",
        "hidden_size": 16,
        "intermediate_size": 16,
        "max_position_embeddings": 77,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "vocab_size": 49408,
        "eos_token_id": 49407,
    }

    class Small(SDClipModel):
        def __init__(self, **named):
            super().__init__(textmodel_json_config=sizes, **named)

    class Text(SD1ClipModel):
        def __init__(self, **named):
            super().__init__(clip_model=Small, **named)

    class Target:
        params, clip, tokenizer = {}, Text, SD1Tokenizer

    vae = comfy.sd.VAE(
        {n: t for n, t in TAESD(latent_channels=16).state_dict().items() if n.startswith("taesd")}
    )
    return {"clip": comfy.sd.CLIP(Target), "vae": vae}


def test_a_checkpoint(saved, opened, load, velocity, bundle, teacher, beside):
    model = load(bundle.name, base=teacher.name, variant="smallest")
    path, expected = saved(model, "CheckpointSave", **beside), velocity(model)
    assert {name.split(".")[0] for name in TensorFile(path).keys()} > {"model"}
    with torch.inference_mode():
        whole = comfy.sd.load_checkpoint_guess_config(
            str(path), output_vae=False, output_clip=False
        )[0]
    for name, actual in {**opened(path), "checkpoint": velocity(whole)}.items():
        assert relative_error(actual, expected) < TOLERANCE, name
