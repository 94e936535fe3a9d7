"""LoRAs merged into models of every kind; the pictures are compared with ComfyUI's in
`tests/comfyui/inside/host/test_lora_files.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ppcl_engine.__main__ import main
from ppcl_engine.models.lora_files import LoraFile
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.weights import Weights
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import ExportConfig, MergeConfig, lora_given
from ppcl_engine.stages.convert.export import export
from ppcl_engine.stages.convert.merge import merge
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ...tiny.lora_files import module_of, write_lora
from ...tiny.trained_run import write_parts

KINDS = ("kohya", "LoKr", "DoRA by columns", "LoHa", "full")
PLAIN = "3-4"  # an interval without a correction


@pytest.fixture(scope="module")
def run(tmp_path_factory, teacher_file) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_parts(Run(folder), teacher_file)
    return folder


@pytest.fixture(scope="module")
def exported(run, teacher_file):
    def make(layout: str, variant: str = "smallest", store: str = "float32") -> Path:
        settings = {"layout": layout, "variant": variant, "store": store}
        name = f"{layout}_{variant}_{store}".replace(",", "_").replace(":", "_")
        return export(ExportConfig(model=teacher_file, run=run, name=name, **settings))

    return make


@pytest.fixture(scope="module")
def bundle(exported) -> Path:
    return exported("bundle")


@pytest.fixture(scope="module")
def loras(tmp_path_factory, model) -> tuple[Path, Path]:
    """Two files with a module for every map of the blocks."""
    folder = tmp_path_factory.mktemp("loras")
    matrices = {
        f"transformer.{name.removesuffix('.weight')}": tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if tensor.ndim == 2 and name.startswith("transformer_blocks.")
    }
    return (
        write_lora(folder / "style.safetensors", matrices, KINDS, seed=1),
        write_lora(folder / "glyph.safetensors", matrices, ("kohya",), seed=2),
    )


@pytest.fixture
def merged(loras, tmp_path):
    """Merges both LoRAs, or others."""

    def make(path: Path, *given: str, **settings) -> Path:
        given = given or (f"{loras[0]}:0.8", f"{loras[1]}:-0.5")
        settings = {"run": tmp_path, "store": "float32", **settings}
        return merge(MergeConfig(path=path, lora=given, **settings))

    return make


@pytest.fixture(scope="module")
def changes(loras, teacher_file) -> dict[str, torch.Tensor]:
    """What both together add to the full model, by diffusers' names."""
    weights = Weights(teacher_file)
    files = [LoraFile(path, weights.architecture, weights.config) for path in loras]
    return {
        key: files[0].change(key, 0.8, weights.read) + files[1].change(key, -0.5)
        for key in files[0].targets
    }


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return open_model(path).state_dict()


def differing(states, others) -> list[str]:
    assert states.keys() == others.keys()
    return [name for name in states if not torch.equal(states[name], others[name])]


@pytest.mark.parametrize("layout", ["same", "diffusers"])
def test_a_full_model(merged, teacher_file, model, changes, layout):
    path = merged(teacher_file, layout=layout)
    state = state_of(path)
    for name, tensor in model.state_dict().items():
        expected = tensor + changes[name] if name in changes else tensor
        torch.testing.assert_close(state[name], expected, rtol=1e-6, atol=1e-6)
    assert len(changes) > 40


@pytest.mark.parametrize("variant", ["small", "smallest", "1-2,text:3-4", "ffn_image:1"])
def test_a_variant_of_a_bundle(
    merged, bundle, exported, teacher_file, loras, changes, variant, capsys
):
    """What a block's student and a cut map keep of the changes; a projection takes none. Merged into
    the variant's own file, the same."""
    plain = (f"{loras[1]}:-0.5",)
    path = merged(bundle, *plain, base=teacher_file, variant=variant)
    assert f"{loras[1].name} at -0.5: covers " in (printed := capsys.readouterr().out)
    assert ("belong to removed blocks" in printed) == ("1-2" in variant or "small" in variant)
    weights = Weights(teacher_file)
    file = LoraFile(loras[1], weights.architecture, weights.config)
    before, after = open_model(bundle, variant, teacher_file).state_dict(), state_of(path)
    for name, tensor in before.items():
        change = file.change(name, -0.5)
        if change is not None and change.shape[1] == tensor.shape[1]:
            tensor = tensor + change[: tensor.shape[0]]
        torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=1e-6)
    assert differing(before, after)
    again = merged(exported("ppcl", variant), *plain, name="again")
    assert not differing(after, state_of(again))


def test_a_renumbered_file_keeps_the_numbers_of_the_teacher(merged, bundle, exported, teacher_file):
    renumbered = exported("comfyui", PLAIN)
    path = merged(bundle, base=teacher_file, variant=PLAIN, layout="comfyui")
    again = merged(renumbered, name="again")
    files = [TensorFile(file) for file in (path, again)]
    assert not differing(*(file.read_all() for file in files))
    assert differing(files[0].read_all(), TensorFile(renumbered).read_all())
    assert json.loads(files[0].metadata["ppcl_loras"])[0] == {
        "file": "style.safetensors",
        "strength": 0.8,
    }


def test_the_order_does_not_matter(merged, bundle, teacher_file, loras):
    given = [f"{loras[0]}:0.8", f"{loras[1]}", f"{loras[0]}:0.3"]
    options = {"base": teacher_file, "variant": "smallest"}
    first = merged(bundle, *given, **options)
    second = merged(bundle, *reversed(given), **options, name="second")
    assert not differing(TensorFile(first).read_all(), TensorFile(second).read_all())


@pytest.mark.parametrize("store", ["float32", "bfloat16", "int8", "float8"])
def test_strength_0_gives_the_base_back(merged, exported, loras, store):
    """Matrices of a quantised file are not rounded once more."""
    base = exported("comfyui", PLAIN, store)
    path = merged(base, f"{loras[0]}:0", store=store)
    assert not differing(TensorFile(base).read_all(), TensorFile(path).read_all())


@pytest.mark.parametrize(
    "layout, store, bound",
    [("comfyui", "float8", 0.05), ("comfyui", "int8", 0.02), ("gguf", "q8_0", 0.02)],
)
def test_quantised_in_and_out(merged, exported, store, layout, bound):
    expected = state_of(merged(exported(layout, PLAIN, "float32"), layout="comfyui"))
    state = state_of(merged(exported(layout, PLAIN, store), store=store, name=store))
    for name, tensor in expected.items():
        assert (state[name] - tensor).norm() <= bound * tensor.norm(), name


def test_a_dry_run(teacher_file, loras, tmp_path, capsys):
    """It says what a merge would take, and writes nothing."""
    words = [word for path in loras for word in ("--lora", f"{path}:0.5")]
    command = ["merge", "--path", str(teacher_file), *words, "--run", str(tmp_path)]
    assert main([*command, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == [
        f"{path.name} at 0.5" for path in loras
    ]
    assert "GB read" in lines[2] and not (tmp_path / "exports").exists()
    assert main([*command, "--store", "float32"]) == 0
    printed = capsys.readouterr()
    assert (tmp_path / "exports/merged.safetensors").exists()
    assert "next: ppcl inspect --path" in printed.err


@pytest.mark.parametrize(
    "text, path, strength",
    [
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        (r"C:\x.safetensors:0.8", r"C:\x.safetensors", 0.8),
        (r"C:\x.safetensors", r"C:\x.safetensors", 1.0),
        ("C:/a:b/x:0.5", "C:/a:b/x", 0.5),
    ],
)
def test_a_strength_behind_a_path(text, path, strength):
    assert lora_given(text) == (Path(path), strength)


@pytest.mark.parametrize("text", ["a.safetensors:much", "a:", ":1", "a:nan", "a:inf", "a:101"])
def test_bad_strengths(text, error_of):
    line = error_of("merge", "--path", "x", "--lora", text)
    assert "write FILE:STRENGTH, the strength a number from -100 to 100" in line


def test_bad_input(error_of, teacher_file, bundle, exported, loras, tmp_path):
    """One line each, before anything is written."""
    width, other = tmp_path / "width.safetensors", tmp_path / "other.safetensors"
    gone = tmp_path / "gone.safetensors"
    write_tensors(width, module_of("kohya", "transformer_blocks.0.attn.to_q", 64, 64))
    write_tensors(other, module_of("kohya", "double_blocks.0.img_attn.qkv", 96, 32))
    write_tensors(gone, module_of("kohya", "transformer_blocks.2.attn.to_q", 32, 32))
    base, corrected = ("--base", teacher_file), ("--variant", "1-2", "--layout", "comfyui")
    for words, message in {
        ("--path", teacher_file): "needs --lora",
        ("--path", teacher_file, "--lora", tmp_path): "no such file",
        ("--path", teacher_file, "--lora", teacher_file): "is not a LoRA",
        ("--path", teacher_file, "--lora", width): "is a LoRA of another model",
        ("--path", teacher_file, "--lora", other): "changes nothing that qwen_image has",
        ("--path", loras[0], "--lora", loras[0]): "is a LoRA, not a full model",
        ("--path", bundle, "--lora", loras[0]): "give the base model it was made from as --base",
        ("--path", teacher_file, *base, "--lora", loras[0]): "not a bundle, so it has no base",
        (
            "--path",
            bundle,
            *base,
            "--variant",
            "1-2",
            "--lora",
            gone,
        ): "changes nothing that is left",
        ("--path", bundle, *base, *corrected, "--lora", loras[0]): "has a correction",
        ("--path", teacher_file, "--layout", "ppcl", "--lora", loras[0]): "carries no plan",
        ("--path", teacher_file, "--store", "q8_0", "--lora", loras[0]): "is not for --layout",
    }.items():
        line = error_of("merge", *map(str, words), "--run", str(tmp_path))
        assert message in line, line
    assert not (tmp_path / "exports").exists()
