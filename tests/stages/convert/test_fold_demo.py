"""The bundled teacher and its bundle, folded: every variant draws the same bits or within the
bound, guidance on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import ppcl_engine.demo
from ppcl_engine import open_model
from ppcl_engine.__main__ import main
from ppcl_engine.data.codecs import open_codec
from ppcl_engine.data.sampling import draw_prompts, encode_prompts
from ppcl_engine.settings.convert_settings import FoldConfig
from ppcl_engine.stages.convert.fold import fold

from ...tiny.folds import relative

DEMO = Path(ppcl_engine.demo.__file__).parent


@pytest.fixture(scope="module")
def demo_folded(tmp_path_factory):
    """The bundled teacher's bundle in both forms: (bundle, its base)."""
    made = {"off": (DEMO / "demo.ppcl.safetensors", DEMO / "teacher.safetensors")}
    for form in ("table", "basis"):
        config = FoldConfig(
            path=made["off"][0],
            base=made["off"][1],
            form=form,
            steps="2",
            dtype="float32",
            samples="2",
            device="cpu",
            run=tmp_path_factory.mktemp(form),
        )
        path = fold(config)
        made[form] = path, path.with_name("folded_base.safetensors")
    return made


@pytest.mark.parametrize("variant", ["full", "large", "medium", "small", "smallest"])
def test_every_variant_of_the_bundled_teacher(demo_folded, architecture, variant):
    """Two captions, guidance on: a table draws the same bits, a basis of one per cent almost the
    same picture."""
    codec = open_codec(demo_folded["off"][1])
    prompts = encode_prompts(
        codec,
        [
            "a white K on a blue circle, yellow background",
            "a red 7 on a white hexagon, green background",
        ],
    )
    drawn = {
        form: draw_prompts(
            architecture, open_model(path, variant, base), prompts, 0, 2, 2.0, 2, form
        )
        for form, (path, base) in demo_folded.items()
    }
    assert torch.equal(drawn["table"], drawn["off"])
    assert 0 < relative(drawn["basis"], drawn["off"]) < 0.03
    report = json.loads((demo_folded["basis"][0].parents[1] / "folded.json").read_text())
    assert next(row for row in report["curve"] if row["rank"] == report["rank"])["worst"] <= 0.01


def test_a_folded_file_brings_its_codec(demo_folded, tmp_path):
    """`ppcl generate` with nothing else."""
    arguments = [
        "generate",
        "--path",
        str(demo_folded["table"][1]),
        "--prompt",
        "a white K on a blue circle, yellow background",
    ]
    assert (
        main([*arguments, "--steps", "2", "--output", str(tmp_path / "a.png")]) == 0
        and (tmp_path / "a.png").exists()
    )
    assert main([*arguments, "--steps", "3", "--output", str(tmp_path / "b.png")]) == 2
    base = ["--base", str(DEMO / "teacher.safetensors")]
    assert main([*arguments, *base, "--steps", "3", "--output", str(tmp_path / "b.png")]) == 0
