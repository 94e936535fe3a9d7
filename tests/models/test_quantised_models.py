"""Models in formats of few bits: what is written is read as the numbers that the formats' own
packages say, in whole matrices and in parts of joined ones, and the rest is refused in one line."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor

from ppcl_engine.architectures import architecture_named
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.storing import BITS, GGUF_STORES, is_block_matrix, stored_entries
from ppcl_engine.models.streaming import Teacher
from ppcl_engine.models.tensor_sources import Source, comfyui_sources, write_gguf_sources
from ppcl_engine.models.weights import Weights
from ppcl_engine.system import optional_packages
from ppcl_engine.system.few_bits import FORMATS, STORES
from ppcl_engine.system.gguf_files import GGUFFile
from ppcl_engine.system.tensor_files import TensorFile, write_tensor_stream, write_tensors

from ..tiny.models import comfyui_state, tiny_inputs, tiny_model

HEADS = {"attention_head_dim": 32, "num_attention_heads": 2, "num_layers": 2}
WIDE = {
    "qwen_image": {**HEADS, "axes_dims_rope": [4, 14, 14]},
    "flux1": {**HEADS, "axes_dims_rope": [4, 14, 14], "num_single_layers": 2},
    "sd35": {**HEADS, "caption_projection_dim": 64, "dual_attention_layers": [0]},
    "z_image": {"dim": 192, "n_heads": 6, "n_kv_heads": 6, "n_layers": 2, "axes_dims": [8, 12, 12]},
    "qwen_image_21": {"num_layers": 2},
}
ROUNDING = {
    "int8": 0.01,
    "int8_convrot": 0.01,
    "mxfp8": 0.03,
    "nvfp4": 0.12,
    "w4a4": 0.2,
    "bfloat16": 0.003,
    "q8_0": 0.007,
    "q5_1": 0.05,
    "q5_0": 0.06,
    "q4_1": 0.1,
    "q4_0": 0.12,
}
"""store -> the largest relative error of a random matrix"""


@pytest.fixture(scope="module", params=WIDE)
def named(request):
    """(architecture, model, its tensors by ComfyUI's names)"""
    architecture = architecture_named(request.param)
    model = tiny_model(architecture, **WIDE[request.param])
    return architecture, model, comfyui_state(architecture, model)


@pytest.fixture(scope="module")
def written(named, tmp_path_factory):
    """Writes the model in a precision, once each."""
    architecture, _, tensors = named
    folder, sources = tmp_path_factory.mktemp("quantised"), {}
    for name, tensor in tensors.items():
        sources[name] = Source(tuple(tensor.shape), lambda t=tensor: t)

    def write(store: str):
        path = folder / f"{store}.{'gguf' if store in GGUF_STORES else 'safetensors'}"
        if path.exists():
            return path
        if store in GGUF_STORES:
            write_gguf_sources(path, architecture, sources, store, {}, {})
            return path
        entries = [e for n, s in sources.items() for e in stored_entries(n, s.shape, s.read, store)]
        write_tensor_stream(path, entries)
        return path

    return write


@pytest.mark.parametrize("store", [*STORES, "q8_0", "q4_0"])
def test_numbers_survive_up_to_the_format_s_rounding(named, written, store):
    _, model, _ = named
    weights, exact = Weights(written(store)), model.state_dict()
    for key in weights.keys():
        assert weights.shape(key) == tuple(exact[key].shape)
        read, bound = weights.read(key, torch.float32), ROUNDING[store]
        bound = bound if weights.is_scaled(key) else ROUNDING["bfloat16"]
        assert (read - exact[key]).norm() <= bound * exact[key].norm(), key


@pytest.mark.parametrize("store", STORES)
def test_numbers_are_comfy_kitchen_s_own(named, written, store):
    """Of a whole file by ComfyUI's names, against the package; bit for bit."""
    architecture, _, tensors = named
    file, weights = TensorFile(written(store)), Weights(written(store))
    read = {
        name: s.read()
        for name, s in comfyui_sources_of(architecture, weights).items()
        if f"{name.removesuffix('weight')}comfy_quant" in file.entries
    }
    quantised = {name for name, t in tensors.items() if is_block_matrix(name, tuple(t.shape))}
    assert read.keys() == quantised and quantised
    for name, values in read.items():
        module = name.removesuffix("weight")
        said = json.loads(bytes(file.read(f"{module}comfy_quant").tolist()))
        form = FORMATS[said.pop("format")]
        made = QuantizedTensor.from_float(
            tensors[name], form.layout, **STORES[store].options, **said
        )
        assert torch.equal(values, made.dequantize()), name
        for leaf, tensor in made.state_dict("weight").items():
            stored = file.read(module + leaf)
            assert stored.dtype == tensor.dtype
            assert torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (stored, tensor)))


def comfyui_sources_of(architecture, weights: Weights):
    sources = {
        key: Source(weights.shape(key), lambda key=key: weights.read(key, torch.float32))
        for key in weights.keys()
    }
    return comfyui_sources(architecture, sources)


@pytest.mark.parametrize("store", ["float32", "bfloat16", "q8_0", "q5_1", "q4_1"])
def test_gguf_tensor_by_tensor(named, written, store):
    """By gguf's own reader and dequantiser, under the names that ComfyUI-GGUF gives to a model."""
    architecture, _, tensors = named
    reader = gguf.GGUFReader(written(store))
    assert reader.get_field("general.architecture").contents() == architecture.gguf_name
    assert [t.name for t in reader.tensors] == list(tensors)
    file, kind = GGUFFile(written(store)), GGUF_STORES[store][0]
    weights = comfyui_sources_of(architecture, Weights(written(store)))
    for tensor in reader.tensors:
        exact, block = tensors[tensor.name], is_block_matrix(tensor.name, file.whole(tensor.name))
        plain = "F32" if exact.ndim == 1 else tensor.tensor_type.name
        assert tensor.tensor_type.name == (kind if block else plain)
        assert tuple(reversed(tensor.shape.tolist())) == tuple(exact.shape)
        theirs = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        ours = weights[tensor.name].read()
        assert torch.equal(ours, theirs.reshape(exact.shape)), tensor.name
        assert (ours - exact).norm() <= ROUNDING.get(store, 0.003) * exact.norm()


def test_general_architecture_is_one_that_comfyui_gguf_knows():
    """The names in its loader's list of image models."""
    known = {"flux", "sd3", "qwen_image", "lumina2", "wan"}
    assert {architecture_named(name).gguf_name for name in WIDE} <= known


@pytest.mark.parametrize("store", ["nvfp4", "q5_0"])
def test_a_model_runs_and_streams_from_it(named, written, store):
    """As a teacher does: block by block, with the numbers of the file alone."""
    architecture, model, _ = named
    opened = open_model(written(store))
    assert set(opened.state_dict()) == set(model.state_dict())
    inputs = tiny_inputs(architecture, **WIDE[architecture.name])
    whole = architecture.call(opened, inputs)
    streamed = open_model(written(store), streamed=True)
    assert torch.equal(architecture.call(streamed, inputs), whole)
    exact = architecture.call(model, inputs)
    assert 0 < (whole - exact).norm() < 0.6 * exact.norm()
    teacher = Teacher(Weights(written(store)), torch.float32, "cpu", True)
    assert teacher.weights.fingerprint == Weights(written("mxfp8")).fingerprint


MATRIX = "transformer_blocks.0.attn.to_q"


def saved(path, store: str, **changes) -> Weights:
    """A Qwen-Image in one format, with other tensors of one matrix."""
    architecture = architecture_named("qwen_image")
    tensors = comfyui_state(architecture, tiny_model(architecture, **WIDE["qwen_image"]))
    entries = stored_entries(
        f"{MATRIX}.weight", (64, 64), lambda: tensors[f"{MATRIX}.weight"], store
    )
    tensors |= {entry.name: entry.read() for entry in entries}
    tensors |= {f"{MATRIX}.{leaf}": tensor for leaf, tensor in changes.items()}
    write_tensors(path, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    return Weights(path)


def test_smoothed_inputs_are_undone(tmp_path):
    smoothing = torch.linspace(0.5, 2, 64)
    plain = saved(tmp_path / "a.safetensors", "nvfp4").read(f"{MATRIX}.weight", torch.float32)
    smoothed = saved(tmp_path / "b.safetensors", "nvfp4", pre_quant_scale=smoothing)
    assert torch.equal(smoothed.read(f"{MATRIX}.weight", torch.float32), plain * smoothing)


def test_scales_that_are_stored_as_bytes(tmp_path):
    """As older files have them."""
    for store in ("mxfp8", "nvfp4"):
        exact = saved(tmp_path / f"{store}.safetensors", store)
        scale = TensorFile(tmp_path / f"{store}.safetensors").read(f"{MATRIX}.weight_scale")
        old = saved(tmp_path / "old.safetensors", store, weight_scale=scale.view(torch.uint8))
        assert torch.equal(old.read(f"{MATRIX}.weight"), exact.read(f"{MATRIX}.weight"))


BAD_SCALES = {
    "too few": ("w4a4", {"weight_scale": torch.ones(3)}, "cannot be read as convrot_w4a4"),
    "not finite": (
        "nvfp4",
        {"weight_scale_2": torch.tensor(float("nan"))},
        "is not finite",
    ),
    "missing": ("mxfp8", {"weight_scale": None}, "is mxfp8 and has no scale"),
    "none at all": ("int8_convrot", {"weight_scale": None}, "has no scale"),
}


@pytest.mark.parametrize("store, changes, reason", BAD_SCALES.values(), ids=BAD_SCALES)
def test_bad_scales_are_one_line(tmp_path, store, changes, reason):
    with pytest.raises(ValueError, match=f"a.safetensors.*{MATRIX}.*{reason}") as error:
        saved(tmp_path / "a.safetensors", store, **changes).read(f"{MATRIX}.weight")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("store, said", [("nvfp4", "comfy-kitchen"), ("q8_0", "gguf")])
@pytest.mark.parametrize("named", ["qwen_image"], indirect=True)
def test_without_the_package(written, monkeypatch, store, said):
    path = written(store)

    def missing(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(optional_packages, "import_module", missing)
    with pytest.raises(
        ValueError, match=rf"^{path}.* needs the package {said}: pip install"
    ) as error:
        Weights(path).read(f"{MATRIX}.weight")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=f"--(store|layout).*needs the package {said}"):
        stored_entries(f"{MATRIX}.weight", (64, 64), lambda: None, "nvfp4") if said != "gguf" else (
            write_gguf_sources(path, architecture_named("flux1"), {}, store, {}, {})
        )


@pytest.mark.parametrize("store", ["mxfp8", "w4a4", "nvfp4", "int8_convrot"])
def test_sizes_that_a_format_cannot_hold(store):
    with pytest.raises(ValueError, match=f"{MATRIX}.weight is 40 x 40, which --store {store}"):
        stored_entries(f"{MATRIX}.weight", (40, 40), lambda: None, store)


DAMAGED = {
    "cut off in the header": lambda data: data[:40],
    "cut off in the tensors": lambda data: data[: len(data) // 2],
    "not GGUF": lambda data: b"rubbish" * 9,
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("named", ["qwen_image"], indirect=True)
def test_a_damaged_gguf_file_is_one_line(written, tmp_path, change):
    path = tmp_path / "a.gguf"
    path.write_bytes(change(written("q8_0").read_bytes()))
    with pytest.raises(ValueError, match="a.gguf cannot be read as GGUF") as error:
        Weights(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("store", STORES)
def test_bytes_of_a_real_matrix(store):
    """As many as the table says, scales of rows included; nothing is computed before it is written."""
    shape = (12288, 3072)
    entries = stored_entries(f"{MATRIX}.weight", shape, lambda: pytest.fail("read"), store)
    size = sum(entry.size for entry in entries)
    assert size <= 1.01 * shape[0] * shape[1] * BITS[store] / 8


@pytest.mark.parametrize("store", ["int8_convrot", "q8_0"])
def test_a_file_is_its_parts(written, store):
    """Beside a header of names, nothing."""
    path = written(store)
    if store in GGUF_STORES:
        parts = [tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors]
    else:
        parts = [
            e["data_offsets"][1] - e["data_offsets"][0] for e in TensorFile(path).entries.values()
        ]
    header = 200 * len(parts) + 200
    assert sum(parts) <= path.stat().st_size <= sum(parts) + header


def test_matrices_of_z_image_s_blocks_are_quantised():
    """Its blocks are called layers; its refiners are not among them."""
    assert is_block_matrix("layers.3.attention.qkv.weight", (192, 64))
    assert not is_block_matrix("noise_refiner.0.attention.qkv.weight", (192, 64))
