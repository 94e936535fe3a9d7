"""`ppcl fold` on every kind of file, each unfolded again to the very file that it was."""

from __future__ import annotations

import pytest
import torch

from ppcl_engine import open_model
from ppcl_engine.models.bundle import Bundle
from ppcl_engine.models.stored_layout import COMFYUI_PREFIX
from ppcl_engine.models.weights import parameter_count
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import ExportConfig, ImportConfig
from ppcl_engine.stages.convert.export import export
from ppcl_engine.stages.convert.import_released import import_released
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ...tiny.folds import relative, same_files, tensors_of
from ...tiny.released_models import (
    INTERVALS,
    KEPT,
    LISTS,
    TEACHER_BLOCKS,
    released_state,
    write_folder,
)
from ...tiny.trained_run import write_parts

VARIANTS = ("full", "small", "smallest", "1-2,text:3-4", "3-4,ffn_image:1", "smallest_tuned")


def test_a_checkpoint_keeps_what_is_beside_the_transformer(folded, output, tmp_path, make_model):
    head_32 = make_model(attention_head_dim=32, axes_dims_rope=[4, 14, 14])
    tensors = {f"{COMFYUI_PREFIX}{n}": t for n, t in head_32.state_dict().items()} | {
        "vae.mean": torch.ones(3)
    }
    write_tensors(tmp_path / "checkpoint.safetensors", tensors)
    path = folded(tmp_path / "checkpoint.safetensors", "table")
    assert torch.equal(
        output(open_model(path)), output(open_model(tmp_path / "checkpoint.safetensors"))
    )
    assert torch.equal(TensorFile(path).read("vae.mean"), torch.ones(3))
    back = folded(path, "off", base=tmp_path / "checkpoint.safetensors", name="back")
    assert same_files(back, tmp_path / "checkpoint.safetensors")


def test_a_diffusers_folder(folded, output, model, tmp_path):
    model.save_pretrained(tmp_path / "transformer", max_shard_size="200KB")
    path = folded(tmp_path / "transformer", "table")
    assert torch.equal(output(open_model(path)), output(model))
    back = folded(path, "off", base=tmp_path / "transformer", name="back")
    assert torch.equal(output(open_model(back)), output(model))
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in tensors_of(back).items())


def in_scaled_fp8(source, path):
    """The same file with its matrices in scaled fp8, as ComfyUI saves one."""
    stored = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors_of(source).items():
        if tensor.ndim == 2 and tensor.numel():
            scale = tensor.abs().max() / 448
            stored |= {
                name: (tensor / scale).to(torch.float8_e4m3fn),
                name.removesuffix("weight") + "scale_weight": scale,
            }
        else:
            stored[name] = tensor
    write_tensors(path, stored, TensorFile(source).metadata)
    return path


def test_a_scaled_fp8_file_keeps_its_precision(folded, output, teacher_file, tmp_path):
    original = in_scaled_fp8(teacher_file, tmp_path / "fp8.safetensors")
    path = folded(original, "table")
    assert torch.equal(output(open_model(path)), output(open_model(original)))
    kept = TensorFile(path)
    assert kept.dtype("transformer_blocks.0.attn.to_q.weight") is torch.float8_e4m3fn
    assert kept.dtype("transformer_blocks.0.img_mod.1.weight") is torch.float32
    assert "transformer_blocks.0.img_mod.1.scale_weight" not in kept.keys()
    assert same_files(folded(path, "off", base=original, name="back"), original)


def test_a_standalone_in_scaled_fp8(folded, output, exported, tmp_path):
    """Its modulations are folded as their real values."""
    original = in_scaled_fp8(exported("ppcl", "small"), tmp_path / "fp8.safetensors")
    path = folded(original, "table")
    assert relative(output(open_model(path)), output(open_model(original))) < 1e-5
    assert same_files(folded(path, "off", base=original, name="back"), original)


@pytest.mark.parametrize("form", ["table", "basis"])
def test_an_edit_models_single_file(
    folded, architecture, make_model, padded_inputs, tmp_path, form
):
    """An empty tensor in it says that the reference's tokens are modulated as at t = 0: the table
    gets that column too."""
    model = make_model(attention_head_dim=32, axes_dims_rope=[4, 14, 14], zero_cond_t=True)
    original = tmp_path / "edit.safetensors"
    write_tensors(original, {**model.state_dict(), next(iter(architecture.marks)): torch.empty(0)})
    path = folded(original, form)
    inputs = padded_inputs(samples=3, references=((1, 2, 3),))
    inputs["timestep"] = torch.tensor([1, 0.75, 0.25])
    found = open_model(path)
    ours, theirs = (architecture.call(m, inputs) for m in (found, model))
    assert torch.equal(ours, theirs) if form == "table" else 0 < relative(ours, theirs) < 0.5
    assert form == "basis" or found.time_text_embed.folding.timesteps.tolist() == [
        1,
        0.75,
        0.5,
        0.25,
        0,
    ]
    assert same_files(folded(path, "off", base=original, name="back"), original)


@pytest.mark.parametrize("form", ["table", "basis"])
def test_a_released_width_pruned_model(folded, output, architecture, make_model, tmp_path, form):
    """By `ppcl import`, whose file keeps the teacher's indices."""
    config = architecture.with_blocks(architecture.tiny_config, KEPT)
    state = released_state(make_model(num_layers=TEACHER_BLOCKS), KEPT, LISTS)
    released = write_folder(tmp_path / "released", state, config, LISTS)
    with pytest.raises(
        ValueError, match="is width-pruned .*; `ppcl import` makes a bundle or a standalone of it"
    ):
        folded(released, form)
    settings = {"layout": "ppcl", "intervals": INTERVALS, "store": "float32", "device": "cpu"}
    path = folded(import_released(ImportConfig(path=released, run=tmp_path, **settings)), form)
    ours, theirs = output(open_model(path)), output(open_model(released))
    assert torch.equal(ours, theirs) if form == "table" else 0 < relative(ours, theirs) < 0.5


@pytest.mark.parametrize("variant", ["small", "smallest", "1-2,text:3-4"])
@pytest.mark.parametrize("form", ["table", "basis"])
def test_a_standalone(folded, output, exported, form, variant):
    original = exported("ppcl", variant)
    path = folded(original, form)
    ours, theirs = output(open_model(path)), output(open_model(original))
    assert torch.equal(ours, theirs) if form == "table" else 0 < relative(ours, theirs) < 0.5
    assert same_files(folded(path, "off", base=original, name="back"), original)


@pytest.mark.parametrize("form", ["table", "basis"])
def test_a_bundle_with_its_base(folded, output, exported, teacher_file, tmp_path, form):
    original = exported("bundle")
    path = folded(original, form, base=teacher_file)
    base = tmp_path / "exports" / "folded_base.safetensors"
    for name in VARIANTS:
        ours, theirs = (
            output(open_model(path, name, base)),
            output(open_model(original, name, teacher_file)),
        )
        assert torch.equal(ours, theirs) if form == "table" else 0 < relative(ours, theirs) < 0.5
        model = open_model(path, name, base)
        stated = Bundle(path).plan.variant(name).parameters
        assert stated is None or stated == parameter_count(model)
    assert same_files(folded(path, "off", base=original, name="back"), original)
    assert Bundle(tmp_path / "exports" / "back.ppcl.safetensors").plan == Bundle(original).plan
    assert same_files(folded(base, "off", base=teacher_file, name="teacher"), teacher_file)


def test_a_bundle_and_a_base_that_were_not_folded_together(folded, exported, teacher_file):
    original = exported("bundle")
    path = folded(original, "table", base=teacher_file)
    with pytest.raises(
        ValueError, match=r"is folded \(table\), .* is not folded: they were not folded together"
    ):
        open_model(path, "small", teacher_file)
    with pytest.raises(ValueError, match="is not folded, .*they were not folded together"):
        open_model(original, "small", path.with_name("folded_base.safetensors"))


def test_a_bundle_alone_cannot_be_folded(folded, exported):
    with pytest.raises(ValueError, match="is a bundle: students only; give the full model"):
        folded(exported("bundle"), "table")


def test_stock_layouts_are_refused(folded, teacher_file, tmp_path):
    path = folded(teacher_file, "basis")
    folder = Run(tmp_path / "of_folded")
    write_parts(folder, path)
    with pytest.raises(ValueError, match="the model is folded, which stock comfyui cannot run"):
        export(ExportConfig(model=path, run=folder.folder, layout="comfyui", variant="3-4"))
    original = export(
        ExportConfig(model=path, run=folder.folder, layout="bundle", name="of_folded")
    )
    with pytest.raises(
        ValueError, match="was not made by folding a file, so there are no original weights"
    ):
        folded(original, "off", base=teacher_file)
