"""Generate draws with any model file, one model in memory at a time, into a picture of the kind that
its name says."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from ppcl_engine.__main__ import main
from ppcl_engine.demo.bundled import TEACHER
from ppcl_engine.settings.convert_settings import ExportConfig
from ppcl_engine.stages.assess.generate import save_row
from ppcl_engine.stages.convert.export import export

from ...tiny.demo_drawing import CAPTION, drawing
from ...tiny.qwen_image_folder import DRAWING, SIZE


@pytest.fixture
def drawn(tmp_path):
    """A drawn picture of two captions."""

    def draw(*arguments) -> Image.Image:
        output = tmp_path / "drawn.png"
        given = ("--prompt", "a red cat | the sea", "--output", output, "--device", "cpu")
        assert main([str(a) for a in ("generate", *arguments, *given, *SIZE, *DRAWING)]) == 0
        return Image.open(output).copy()

    return draw


def test_every_file_of_a_variant_draws_the_same_pictures(
    pipeline_run, pipeline, transformers, drawn
):
    """The teacher itself, the bundle, and both exports with the folder as what brings text encoder
    and VAE."""
    common = {"model": pipeline, "run": pipeline_run.folder, "store": "float32"}
    bundle = export(ExportConfig(**common, layout="bundle"))
    stock = [
        export(ExportConfig(**common, layout=layout, variant="small", name=layout))
        for layout in ("diffusers", "comfyui")
    ]
    teacher = drawn("--path", pipeline)
    pictures = [drawn("--path", bundle, "--base", pipeline, "--variant", "small")]
    pictures += [drawn("--path", path, "--base", pipeline) for path in stock]
    assert len(transformers) == 4
    assert {picture.size for picture in (teacher, *pictures)} == {(2 * 48 * 8, 32 * 8)}
    contents = {picture.tobytes() for picture in pictures}
    assert len(contents) == 1 and teacher.tobytes() not in contents


@pytest.mark.parametrize("name, form", [("a.png", "PNG"), ("b/a.jpg", "JPEG"), ("a.JPEG", "JPEG")])
def test_a_picture_is_what_its_name_says(tmp_path, name, form):
    assert main([str(a) for a in drawing(tmp_path / name)]) == 0
    with Image.open(tmp_path / name) as picture:
        assert picture.format == form and picture.size == (240, 240)


def test_a_row_too_long_for_a_jpeg_is_said_before_it_is_drawn(line_of, tmp_path):
    line = line_of(*drawing(tmp_path / "a.jpg", "|".join([CAPTION] * 1400)))
    assert "67,200 pixels beside each other are too many for a JPEG; write a .png" in line
    assert not list(tmp_path.iterdir())


def test_a_bundle_and_its_base_are_told_apart(line_of, tmp_path):
    bundle, output = TEACHER.with_name("demo.ppcl.safetensors"), tmp_path / "a.png"
    given = ["generate", "--path", bundle, "--prompt", CAPTION, "--output", output]
    assert line_of(*given) == (
        f"ppcl: {bundle} is a bundle: students only; give the full model it was made from as --base"
    )
    assert line_of(*given, "--base", bundle) == (
        f"ppcl: --base {bundle} is a bundle, not a full model; give the one that {bundle} was made from"
    )
    assert "does not exist" in line_of(*given, "--base", tmp_path / "none")


def test_small_pictures_are_not_enlarged_past_what_a_jpeg_holds(tmp_path):
    save_row(tmp_path / "a.jpg", torch.rand(2, 3, 8, 4000), "JPEG")
    with Image.open(tmp_path / "a.jpg") as picture:
        assert picture.size == (8 * 8000, 8 * 8)
