"""Evaluate compares every variant with the teacher, one model in memory at a time."""

from __future__ import annotations

import json

import pytest

from ppcl_engine.__main__ import main
from ppcl_engine.system.tensor_files import TensorFile

from ...tiny.qwen_image_folder import DRAWING, SIZE


@pytest.fixture
def rows(pipeline_run, pipeline, prompts, transformers) -> list[dict]:
    """What was found of the teacher and of "small"."""
    common = ("--model", pipeline, "--run", pipeline_run.folder, "--device", "cpu")
    given = ("--prompts", prompts, "--captions", 3, "--batch", 2, "--variants", "small")
    assert main([str(a) for a in ("evaluate", *common, *given, *SIZE, *DRAWING)]) == 0
    return json.loads(pipeline_run.evaluation.read_text())["variants"]


def test_a_variant_is_compared_with_the_teacher(rows, pipeline_run, transformers):
    # each is opened again to be timed
    assert [row["name"] for row in rows] == ["full", "small"] and len(transformers) == 4
    assert rows[1]["velocity_error"]["value"] > 0 and rows[1]["psnr"]["value"] < 100
    assert rows[1]["character_accuracy"] is None and rows[1]["text_sensitivity"]["value"] > 0
    pictures = TensorFile(pipeline_run.folder / "pictures.safetensors")
    assert pictures.shape("small") == (3, 3, 32, 48)
    assert (pipeline_run.folder / "report.html").stat().st_size > 10_000
