"""A tiny pipeline and a run with students, barely trained: what assessing needs, and no more."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppcl_engine.__main__ import main
from ppcl_engine.run import Run

from ...tiny.memory import check_one_model_at_a_time
from ...tiny.pruned_run import with_students
from ...tiny.qwen_image_folder import CAPTIONS, DRAWING, SIZE, build_tiny_pipeline


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> Path:
    return build_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="session")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(CAPTIONS) + "\n")
    return path


@pytest.fixture(scope="session")
def pipeline_run(pipeline, prompts, tmp_path_factory, run_stages) -> Run:
    """With students for 1-2 and 3-4, without corrections: every layout can hold them."""
    run = Run(tmp_path_factory.mktemp("run"))
    common = ("--model", pipeline, "--run", run.folder, "--device", "cpu")
    drawn = ("--prompts", prompts, "--samples", 6, "--batch", 2, *SIZE, *DRAWING)
    assert main([str(a) for a in ("calibrate", *common, *drawn)]) == 0
    with_students(pipeline, run.folder, "1-2 3-4", run_stages)
    return run_stages(pipeline, run.folder, "variants")


@pytest.fixture
def transformers(monkeypatch) -> list:
    """The transformers that were in memory, checked to be there one at a time."""
    return check_one_model_at_a_time(monkeypatch)
