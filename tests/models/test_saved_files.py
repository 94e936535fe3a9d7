"""Files as ComfyUI's Save nodes write them: a prefix before every name, no metadata, other parts of
a checkpoint beside them, and FLUX' norms by either of two names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ppcl_engine import open_model
from ppcl_engine.algorithms.sparsity.source import open_source
from ppcl_engine.models.stored_layout import COMFYUI_PREFIX, HINTS_TENSOR, STRUCTURE_TENSOR
from ppcl_engine.models.weights import Weights, usual_name
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import ExportConfig, FoldConfig
from ppcl_engine.stages.assess.inspect import describe
from ppcl_engine.stages.convert.export import export
from ppcl_engine.stages.convert.fold import fold
from ppcl_engine.system.float8 import FP8, FP8_SCALE, scaled_fp8
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ..tiny.flux1_parts import FLUX_DEPTH, FLUX_PARTS
from ..tiny.trained_run import write_parts

PLAIN = {"qwen_image": "3-4", "flux1": "9-10"}  # an interval without a correction
both = pytest.mark.parametrize("architecture", [*PLAIN], indirect=True)


@pytest.fixture(scope="module")
def exported(architecture, make_model, save_model, tmp_path_factory):
    """`exported("ppcl", variant)` is a file of ours."""
    folder, flux = tmp_path_factory.mktemp("saved"), architecture.name == "flux1"
    teacher = save_model(folder / "teacher.safetensors", make_model(**(FLUX_DEPTH if flux else {})))
    write_parts(Run(folder), teacher, parts=FLUX_PARTS if flux else None)

    def make(layout: str, variant: str) -> Path:
        config = {
            "layout": layout,
            "variant": variant,
            "name": f"{layout}_{variant}",
            "store": "float32",
        }
        return export(ExportConfig(model=teacher, run=folder, **config))

    return make


def as_saved(path: Path, saved: Path, rename=lambda name: name) -> Path:
    tensors = {
        COMFYUI_PREFIX + rename(name): tensor
        for name, tensor in TensorFile(path).read_all().items()
    }
    write_tensors(saved, tensors | {"first_stage_model.decoder.conv_in.weight": torch.ones(2)})
    return saved


def other_spelling(name: str) -> str:
    return name.removesuffix("scale") + "weight" if name.endswith("_norm.scale") else name


@both
@pytest.mark.parametrize("layout", ["comfyui", "ppcl"])
@pytest.mark.parametrize(
    "rename", [str, other_spelling], ids=["names of files", "names of newer hosts"]
)
def test_it_is_the_model_that_was_exported(
    architecture, exported, padded_inputs, tmp_path, layout, rename
):
    path = exported(layout, "smallest" if layout == "ppcl" else PLAIN[architecture.name])
    saved = as_saved(path, tmp_path / "saved.safetensors", rename)
    inputs = padded_inputs()
    with torch.no_grad():
        found, expected = (architecture.call(open_model(file), inputs) for file in (saved, path))
    assert torch.equal(found, expected)
    about, original = describe(saved), describe(path)
    assert about == original and ("teacher_blocks" not in about or layout == "comfyui")
    for source in (open_source(saved, None, None), Weights(saved) if layout == "comfyui" else None):
        if source is not None:
            keys = [key for key in open_model(path).state_dict() if "blocks." not in key]
            assert all(
                torch.equal(source.read(key), open_model(path).state_dict()[key]) for key in keys
            )


@both
def test_a_standalone_in_scaled_fp8_is_read_with_its_scales(
    architecture, exported, padded_inputs, tmp_path
):
    path, tensors = exported("ppcl", "smallest"), {}
    for name, tensor in TensorFile(path).read_all().items():
        if name.endswith(".weight") and tensor.ndim == 2 and len(tensor) > 1:
            tensors[name], tensors[name.removesuffix(".weight") + FP8_SCALE] = scaled_fp8(tensor)
        else:
            tensors[name] = tensor
    assert any(tensor.dtype == FP8 for tensor in tensors.values())
    write_tensors(tmp_path / "fp8.safetensors", tensors)
    inputs = padded_inputs()
    with torch.no_grad():
        found, expected = (
            architecture.call(open_model(file), inputs)
            for file in (tmp_path / "fp8.safetensors", path)
        )
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize("layout", ["comfyui", "ppcl"])
def test_it_is_folded_as_the_file_that_was_exported(
    exported, tmp_path, layout, architecture, padded_inputs
):
    path = exported(layout, "smallest" if layout == "ppcl" else "3-4")
    files, inputs = (path, as_saved(path, tmp_path / "saved.safetensors")), padded_inputs()
    given = {"form": "basis", "run": tmp_path, "dtype": "float32", "bound": 0.5, "device": "cpu"}
    found = [
        fold(FoldConfig(path=file, name=f"folded_{n}", **given)) for n, file in enumerate(files)
    ]
    with torch.no_grad():
        first, second = (architecture.call(open_model(file), inputs) for file in found)
    assert torch.equal(first, second)


@both
def test_usual_names(architecture, exported):
    names = [name for name in TensorFile(exported("comfyui", PLAIN[architecture.name])).keys()]
    assert [usual_name(architecture, other_spelling(name)) for name in names] == names
    others = (
        "double_blocks.0.student.img_attn.norm.query_norm.weight",
        "txt_norm.weight",
        STRUCTURE_TENSOR,
        "x",
    )
    assert [usual_name(architecture, name) for name in others] == [*others]


@pytest.mark.parametrize("layout", ["comfyui", "ppcl"])
@pytest.mark.parametrize(
    "said",
    [
        torch.full((8,), 200, dtype=torch.uint8),
        torch.tensor(list(b"[1]"), dtype=torch.uint8),
        torch.tensor(10**9),
    ],
    ids=["no text", "a list", "a number"],
)
def test_what_it_says_of_itself_is_not_readable(exported, tmp_path, layout, said):
    tensors = TensorFile(exported(layout, "smallest" if layout == "ppcl" else "3-4")).read_all()
    name = STRUCTURE_TENSOR if layout == "ppcl" else HINTS_TENSOR
    write_tensors(tmp_path / "broken.safetensors", {**tensors, name: said})
    with pytest.raises(ValueError, match="what it says of its own blocks is not readable") as error:
        open_model(tmp_path / "broken.safetensors")
    assert "\n" not in str(error.value)


def test_a_standalone_that_lacks_a_tensor(exported, tmp_path):
    tensors = TensorFile(exported("ppcl", "smallest")).read_all()
    tensors.pop("img_in.weight")
    write_tensors(tmp_path / "lacks.safetensors", tensors)
    with pytest.raises(ValueError, match="lacks 1 tensors, first img_in.weight"):
        open_model(tmp_path / "lacks.safetensors")
