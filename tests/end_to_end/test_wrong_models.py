"""A plan, an interval or a file that does not fit its model is refused in one line, by every stage
that reads it."""

from __future__ import annotations

import json

import pytest

from ppcl_engine.architectures import architecture_named
from ppcl_engine.models.bundle import write_bundle
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import PruningPlan, parse_intervals
from ppcl_engine.run import Run
from ppcl_engine.system.atomic import write_text
from ppcl_engine.system.tensor_files import write_tensors

STAGES = (
    "distill-depth",
    "detect-width",
    "distill-width",
    "polish",
    "variants",
    "finetune",
    "export",
)


def plan_of(name: str, fingerprint: str, intervals: str) -> PruningPlan:
    architecture = architecture_named(name)
    config = dict(architecture.tiny_config)
    return PruningPlan(
        architecture=name,
        config=config,
        num_blocks=architecture.num_blocks(config),
        fingerprint=fingerprint,
        intervals=parse_intervals(intervals),
    )


@pytest.mark.parametrize("other", ["flux1", "sd35", "qwen_image_21"])
def test_a_plan_of_another_architecture(teacher_file, make_run, tmp_path, line_of, other):
    run, plan = Run(make_run(tmp_path / "run", teacher_file)), plan_of(other, "f" * 64, "1-2")
    write_text(run.plan, plan.to_json())
    expected = f"teacher.safetensors is qwen_image, the plan is for {other}; choose its base"
    for stage in STAGES:
        assert expected in line_of(
            stage, "--model", teacher_file, "--run", run.folder, "--device", "cpu"
        ), stage
    bundle = tmp_path / "other.ppcl.safetensors"
    write_bundle(bundle, plan, [])
    assert expected in line_of("bench", "--path", bundle, "--base", teacher_file, "--device", "cpu")


@pytest.mark.parametrize(
    "architecture, intervals, kinds",
    [("flux1", "3-4", "0-3, 4-7"), ("sd35", "4-5", "0-4, 5-5")],
    indirect=["architecture"],
)
def test_an_interval_over_two_kinds_of_blocks(
    architecture, teacher_file, make_run, tmp_path, line_of, intervals, kinds
):
    """From double blocks to single ones; SD3's last block, which would be dropped."""
    run = Run(make_run(tmp_path / "run", teacher_file))
    write_text(
        run.plan, plan_of(architecture.name, Weights(teacher_file).fingerprint, intervals).to_json()
    )
    expected = (
        f"interval {intervals} holds blocks of two kinds ({kinds}); end it where one kind ends"
    )
    for stage in STAGES:
        assert expected in line_of(
            stage, "--model", teacher_file, "--run", run.folder, "--device", "cpu"
        ), stage


@pytest.mark.parametrize(
    "architecture, dropped, blocks",
    [
        ("qwen_image", "transformer_blocks.3.", 6),
        ("flux1", "transformer_blocks.1.", 8),
        ("flux1", "single_transformer_blocks.2.", 8),
        ("sd35", "transformer_blocks.1.", 6),
    ],
    indirect=["architecture"],
)
def test_a_diffusers_file_with_gaps(model, model_config, tmp_path, line_of, dropped, blocks):
    """Blocks left out without renumbering, in either list of FLUX."""
    path = tmp_path / "gap.safetensors"
    kept = {n: t for n, t in model.state_dict().items() if not n.startswith(dropped)}
    write_tensors(path, kept, {"config": json.dumps(model_config(model))})
    expected = f"gap.safetensors lacks 1 of {blocks} blocks, first {dropped.rstrip('.')}: a full model's blocks are numbered"
    assert expected in line_of("inspect", "--path", path)
    assert expected in line_of("probe", "--model", path, "--run", tmp_path, "--device", "cpu")
