"""What this host does not read is one line that names the format; a matrix of few bits without its
scale is an error."""

from __future__ import annotations

import json

import comfy.ops
import comfy.sd
import comfyui_version
import pytest
import torch

from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ..quantised import KINDS, REFUSED, as_json, stored

pytestmark = pytest.mark.parametrize(
    ("architecture", "host_case"), [("flux1", "flux1_wide")], ids=["flux1"], indirect=True
)
BLOCK = "double_blocks.0.img_attn.proj"


@pytest.fixture(scope="module")
def pruned(exported, tmp_path_factory) -> dict[str, torch.Tensor]:
    return TensorFile(
        exported(tmp_path_factory.mktemp("pruned"), "ppcl", "width", "smallest")
    ).read_all()


@pytest.fixture
def write(models, host_tensors, pruned):
    """Names of a base and of a pruned file in this format, the tensors changed first."""

    def make(kind: str, change=lambda tensors, metadata: None) -> tuple[str, str]:
        for name, tensors in (("refused_base", host_tensors), ("refused_pruned", pruned)):
            found, _, metadata = stored(tensors, KINDS[kind])
            change(found, metadata)
            write_tensors(models.diffusion_models / f"{name}.safetensors", found, metadata)
        return "refused_base.safetensors", "refused_pruned.safetensors"

    return make


@pytest.mark.parametrize("kind", REFUSED)
def test_a_format_that_this_host_does_not_read(write, load, run_node, bundle, kind):
    base, pruned = write(kind)
    message = f": its weights are stored as {KINDS[kind].name}, which ComfyUI {comfyui_version.__version__} does not read"
    for switchable in (True, False):
        with pytest.raises(ValueError, match=base + message) as error:
            load(bundle.name, base=base, switchable=switchable)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=pruned + message):
        load(pruned)
    with pytest.raises(ValueError, match=pruned + message):
        run_node("UNETLoader", unet_name=pruned, weight_dtype="default")


def without(leaf: str):
    return lambda tensors, metadata: tensors.pop(f"{BLOCK}.{leaf}")


def with_part(leaf: str, part: torch.Tensor):
    return lambda tensors, metadata: tensors.update({f"{BLOCK}.{leaf}": part})


def alone(dtype: torch.dtype):
    def change(tensors, metadata) -> None:
        tensors[f"{BLOCK}.weight"] = torch.ones(64, 64, dtype=dtype)
        del tensors[f"{BLOCK}.weight_scale"], tensors[f"{BLOCK}.comfy_quant"]

    return change


DAMAGE = {
    "its scale": (
        without("weight_scale"),
        "is stored as float8_e4m3fn but lacks its weight_scale; copy",
    ),
    "its format": (without("comfy_quant"), "has a scale, but nothing in the file names its format"),
    "the weight": (without("weight"), "is missing, though its scale is there; copy"),
    "int8 alone": (
        alone(torch.int8),
        "is stored in int8 without a scale; use the model in another format",
    ),
    "bool alone": (
        alone(torch.bool),
        "is stored in bool without a scale; use the model in another format",
    ),
    "int16 alone": (
        alone(torch.int16),
        "is stored in int16 without a scale; use the model in another format",
    ),
    "scales by row": (
        with_part("weight_scale", torch.ones(64, 1)),
        r"with scales of shape \(64, 1\), but ComfyUI .* reads a single scale",
    ),
    "a second scale": (
        with_part("weight_scale_2", torch.ones(())),
        "which does not use its weight_scale_2; use",
    ),
    "unreadable": (
        with_part("comfy_quant", torch.zeros(3)),
        "comfy_quant is not readable; copy or download",
    ),
    "a list": (
        with_part("comfy_quant", torch.tensor(list(b"[1]"), dtype=torch.uint8)),
        "comfy_quant is not readable",
    ),
    "16 bits": (
        with_part("weight", torch.ones(64, 64).bfloat16()),
        "is stored as float8_e4m3fn but holds bfloat16 of shape",
    ),
    "another pack's": (
        with_part("weight.absmax", torch.ones(9)),
        "its weights are stored as bitsandbytes, which ComfyUI",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_scale_that_nobody_would_use(write, load, run_node, bundle, damage):
    change, message = DAMAGE[damage]
    base, pruned = write("float8_e4m3fn", change)
    with pytest.raises(ValueError, match=message) as error:
        load(bundle.name, base=base)
    assert str(error.value).startswith(base) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message) as error:
        run_node("UNETLoader", unet_name=pruned, weight_dtype="default")
    assert str(error.value).startswith(pruned)


@pytest.mark.parametrize("text", ["{", "[]", '{"layers": [1]}', '{"layers": {"a": 1}}'])
def test_formats_in_metadata_that_cannot_be_read(write, load, bundle, text):
    base, _ = write(
        "float8_e4m3fn in metadata",
        lambda tensors, metadata: metadata.update(_quantization_metadata=text),
    )
    with pytest.raises(ValueError, match=f"{base}: its _quantization_metadata is not readable"):
        load(bundle.name, base=base)


def test_scales_without_a_word(write, load, run_node, bundle):
    """As the file is where the metadata was lost."""
    base, pruned = write("float8_e4m3fn in metadata", lambda tensors, metadata: metadata.clear())
    with pytest.raises(ValueError, match="has a scale, but nothing in the file names its format"):
        load(bundle.name, base=base)
    with pytest.raises(ValueError, match="has a scale, but nothing in the file names its format"):
        run_node("UNETLoader", unet_name=pruned, weight_dtype="default")


def test_operations_that_do_not_use_scales(write, models):
    """Another pack's operations would turn the weights into noise."""
    _, pruned = write("scaled fp8")
    tensors = TensorFile(models.diffusion_models / pruned).read_all()
    with pytest.raises(
        ValueError,
        match="does not use .* of the file's scales, first .*: its weights would be wrong",
    ):
        comfy.sd.load_diffusion_model_state_dict(
            tensors, {"custom_operations": comfy.ops.manual_cast}
        )


def test_settings_that_are_no_table(write, load, bundle):
    settings = json.loads('{"format": ["float8_e4m3fn"], "params": 3}')
    base, _ = write("float8_e4m3fn", with_part("comfy_quant", as_json(settings)))
    with pytest.raises(ValueError, match="which ComfyUI .* does not read"):
        load(bundle.name, base=base)


def of_weights(make):
    """Each matrix of a block as another program writes it: name, tensor -> what takes its place."""

    def change(tensors, metadata) -> None:
        metadata.clear()
        for name in [n for n in tensors if "_blocks." in n and n.endswith(".weight")]:
            for leaf in ("weight_scale", "comfy_quant"):
                tensors.pop(f"{name.removesuffix('weight')}{leaf}", None)
            tensors.update(make(name, tensors.pop(name)))

    return change


def in_bytes(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


OTHERS = {  # as their files are
    "bitsandbytes": lambda n, t: {
        n: in_bytes(t.numel() // 2, 1),
        f"{n}.absmax": torch.ones(8),
        f"{n}.quant_map": torch.ones(16),
    },
    "bitsandbytes ": lambda n, t: {
        n: t.to(torch.int8),
        n.replace("weight", "SCB"): torch.ones(len(t)),
    },
    "SVDQuant or GPTQ": lambda n, t: {
        n.replace("weight", "qweight"): t.to(torch.int32),
        n.replace("weight", "scales"): t,
    },
    "Quanto": lambda n, t: {f"{n}._data": t.to(torch.int8), f"{n}._scale": torch.ones(len(t), 1)},
    "HQQ": lambda n, t: {
        n.replace("weight", "W_q"): t.to(torch.int32),
        n.replace("weight", "meta"): in_bytes(3),
    },
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_format_of_other_programs(write, load, bundle, kind):
    base, pruned = write("float8_e4m3fn", of_weights(OTHERS[kind]))
    message = f"its weights are stored as {kind.strip()}, which ComfyUI"
    for load_it in (lambda: load(bundle.name, base=base), lambda: load(base), lambda: load(pruned)):
        with pytest.raises(ValueError, match=message):
            load_it()
