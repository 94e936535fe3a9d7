"""What stock loaders read from our files is the engine's own variant, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import load_file

from ppcl_engine.models.opening import open_model
from ppcl_engine.models.standalone import GUARD_SHAPE
from ppcl_engine.models.stored_layout import COMFYUI_PREFIX, HINTS_TENSOR
from ppcl_engine.models.weights import Weights
from ppcl_engine.settings.convert_settings import ExportConfig
from ppcl_engine.stages.convert.export import export
from ppcl_engine.system.tensor_files import TensorFile


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, teacher_file, make_run, run_stages):
    """Run folders by correction: trained for a few steps on two intervals."""
    runs = {}
    for correction in ("none", "affine"):
        folder = make_run(tmp_path_factory.mktemp(correction), teacher_file)
        run_stages(
            teacher_file,
            folder,
            "probe",
            "detect",
            "distill_depth",
            "variants",
            correction=correction,
        )
        runs[correction] = folder
    return runs


@pytest.fixture
def exported(distilled, teacher_file):
    def make(correction: str, layout: str, **options):
        return export(
            ExportConfig(
                model=teacher_file,
                run=distilled[correction],
                layout=layout,
                store="float32",
                **options,
            )
        )

    return make


@pytest.fixture
def engine_output(exported, teacher_file, architecture, padded_inputs):
    def run(correction: str, variant: str = "small") -> torch.Tensor:
        model = open_model(exported(correction, "bundle"), variant, teacher_file)
        return architecture.call(model, padded_inputs(3))

    return run


def test_stock_diffusers_loads_a_stock_standalone(
    exported, engine_output, architecture, padded_inputs, caplog
):
    model = QwenImageTransformer2DModel.from_pretrained(exported("none", "diffusers"))
    assert len(model.transformer_blocks) == 4
    with torch.no_grad():
        assert torch.equal(architecture.call(model, padded_inputs(3)), engine_output("none"))


def test_a_comfyui_single_file_opens_as_the_same_model(
    exported, engine_output, architecture, padded_inputs
):
    path = exported("none", "comfyui")
    # diffusion_models holds bare keys
    assert not any(key.startswith(COMFYUI_PREFIX) for key in load_file(path))
    assert torch.equal(architecture.call(open_model(path), padded_inputs(3)), engine_output("none"))


@pytest.mark.parametrize("correction", ["none", "affine"])
def test_our_own_layout_keeps_teacher_indices_and_corrections(
    exported, engine_output, architecture, padded_inputs, model, correction
):
    path = exported(correction, "ppcl")
    assert torch.equal(
        architecture.call(open_model(path), padded_inputs(3)), engine_output(correction)
    )
    assert len(open_model(path).transformer_blocks) == 6
    file = TensorFile(path)
    (guard,) = [key for key in file.keys() if file.shape(key) == GUARD_SHAPE]
    assert guard in model.state_dict()  # a stock host expects it, in another shape


def test_the_map_back_to_teacher_blocks(exported, distilled):
    plan = json.loads((distilled["none"] / "plan.json").read_text())
    gaps = {b for i in plan["intervals"] for b in range(i["first"] + 1, i["last"] + 1)}
    file = TensorFile(exported("none", "comfyui"))
    hints = json.loads(bytes(file.read(HINTS_TENSOR).tolist()))  # what hosts keep of a file
    expected = [b for b in range(6) if b not in gaps]
    assert (
        json.loads(file.metadata["ppcl_block_map"]) == hints["indices"] == expected
        and hints["blocks"] == 6
    )


def test_full_is_the_teacher_and_variants_differ(engine_output, model, architecture, padded_inputs):
    with torch.no_grad():
        teacher = architecture.call(model, padded_inputs(3))
    assert torch.equal(engine_output("affine", "full"), teacher)
    assert not torch.equal(engine_output("affine"), teacher)


def test_a_bundle_holds_students_only(exported, teacher_file):
    size = exported("affine", "bundle").stat().st_size
    assert size < 0.6 * teacher_file.stat().st_size


def test_corrections_and_paths_are_refused(exported):
    with pytest.raises(ValueError, match="has a correction, which stock diffusers cannot run"):
        exported("affine", "diffusers")
    with pytest.raises(ValueError, match="letters, digits"):
        exported("none", "bundle", name="../up")


def test_a_standalone_of_another_layout_is_complete(exported):
    weights = Weights(exported("none", "diffusers"))
    assert weights.num_blocks == 4


def test_scaled_fp8_opens_as_nearly_the_same_model(
    exported, engine_output, architecture, padded_inputs, distilled, teacher_file
):
    exact = exported("none", "comfyui", name="exact")
    path = export(
        ExportConfig(model=teacher_file, run=distilled["none"], layout="comfyui", store="float8")
    )
    assert path.stat().st_size < 0.4 * exact.stat().st_size
    stored = load_file(path)
    matrices = {name for name, tensor in load_file(exact).items() if tensor.ndim == 2}
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn} == {
        *matrices,
        "scaled_fp8",
    }
    ours, theirs = architecture.call(open_model(path), padded_inputs(3)), engine_output("none")
    assert 0 < float((ours - theirs).norm()) < 0.1 * float(theirs.norm())


@pytest.mark.parametrize(
    "layout, store",
    [
        *((layout, "float8") for layout in ("bundle", "ppcl", "diffusers", "gguf")),
        ("diffusers", "nvfp4"),
        ("gguf", "int8"),
        ("comfyui", "q8_0"),
        ("bundle", "q4_0"),
    ],
)
def test_precisions_of_other_layouts(distilled, teacher_file, layout, store):
    with pytest.raises(ValueError, match=f"--store {store} is not for --layout {layout}; use") as e:
        export(ExportConfig(model=teacher_file, run=distilled["none"], layout=layout, store=store))
    assert "\n" not in str(e.value)


@pytest.fixture
def wanted(distilled, teacher_file):
    """Exports in a precision, to a file that `open_model` reads."""

    def make(correction: str, layout: str, store: str):
        config = ExportConfig(
            model=teacher_file, run=distilled[correction], layout=layout, store=store, name=store
        )
        return export(config)

    return make


@pytest.mark.parametrize(
    "layout, store, correction",
    [
        ("comfyui", "int8_convrot", "none"),
        ("comfyui", "nvfp4", "none"),
        ("ppcl", "int8", "affine"),
        ("bundle", "mxfp8", "affine"),
        ("gguf", "q8_0", "none"),
    ],
)
def test_few_bits_open_as_nearly_the_same_model(
    wanted, engine_output, architecture, padded_inputs, teacher_file, layout, store, correction
):
    path, base = wanted(correction, layout, store), teacher_file if layout == "bundle" else None
    assert path.suffix == (".gguf" if layout == "gguf" else ".safetensors")
    ours = architecture.call(open_model(path, "small" if base else None, base), padded_inputs(3))
    theirs = engine_output(correction)
    assert 0 < float((ours - theirs).norm()) < 0.3 * float(theirs.norm())
    exact = wanted(correction, layout, "float32")
    assert path.stat().st_size < 0.6 * exact.stat().st_size
