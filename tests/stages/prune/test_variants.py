"""Damage is what the assembled model shows; named sizes keep their limits; nothing is trained for a
switch."""

from __future__ import annotations

import pytest
import torch

from ppcl_engine.architectures.qwen_image import QwenImage
from ppcl_engine.data.calibration import load_calibration
from ppcl_engine.models.assembly import open_variant
from ppcl_engine.models.streaming import Teacher
from ppcl_engine.models.weights import Weights, parameter_count
from ppcl_engine.settings.prune_settings import VariantsConfig
from ppcl_engine.stages.prune.variants import variants
from ppcl_engine.stages.run_students import RunStudents


@pytest.fixture(scope="module")
def run(tmp_path_factory, teacher_file, make_run, run_stages):
    folder = make_run(tmp_path_factory.mktemp("run"), teacher_file)
    return run_stages(teacher_file, folder, "probe", "detect", "distill_depth", longest=3, remove=3)


def settings(run, teacher_file, **limits) -> VariantsConfig:
    return VariantsConfig(model=teacher_file, run=run.folder, device="cpu", samples=1000, **limits)


def test_damage_and_parameters_are_those_of_the_assembled_model(
    run, teacher_file, architecture, model
):
    variants(settings(run, teacher_file))
    plan, weights = run.load_plan(), Weights(teacher_file)
    inputs = load_calibration(run.calibration).all_inputs()
    with torch.no_grad():
        expected = torch.cat([architecture.call(model, row) for row in inputs])
        for variant in plan.variants:
            students = RunStudents(run, weights.config, architecture)
            pruned = open_variant(weights, students, plan, variant, torch.float32, "cpu")
            ours = torch.cat([architecture.call(pruned, row) for row in inputs])
            damage = float((ours - expected).square().sum() / expected.square().sum())
            assert variant.damage == pytest.approx(damage, rel=1e-4, abs=1e-9)
            assert variant.parameters == parameter_count(pruned)


def test_sizes_are_ordered_and_full_is_the_teacher(run, teacher_file, model):
    variants(settings(run, teacher_file))
    full, large, medium, small = run.load_plan().variants
    assert full.parameters == parameter_count(model) and full.damage == 0 and not full.intervals
    assert full.parameters >= large.parameters >= medium.parameters >= small.parameters
    assert full.flops > small.flops and full.milliseconds > small.milliseconds
    assert small.intervals == tuple(interval.name for interval in run.load_plan().intervals)


def test_limits_are_kept_at_the_least_damage(run, teacher_file):
    variants(settings(run, teacher_file))
    plan = run.load_plan()
    full, small = plan.variant("full").parameters, plan.variant("small").parameters
    between = (full + small) / 2e6
    variants(settings(run, teacher_file, most_parameters=between, most_megabytes=2 * full / 1e6))
    plan = run.load_plan()
    assert plan.variant("within_parameters").parameters <= between * 1e6
    assert plan.variant("within_megabytes").intervals == ()  # the teacher itself fits
    with pytest.raises(ValueError, match="above this limit; raise it"):
        variants(settings(run, teacher_file, most_parameters=small / 2e6))


def damages(run) -> list:
    plan = run.load_plan()
    return [i.score for i in plan.intervals] + [v.damage for v in plan.variants]


def test_models_go_through_the_blocks_together(run, teacher_file, monkeypatch):
    """Streamed: one reading of the blocks for the teacher, one for all intervals, one for all named
    sizes; with less memory more of them, which begin where their models differ from the teacher,
    and the same figures to the bit."""
    variants(settings(run, teacher_file))
    expected, read, loaded = damages(run), {}, []
    load = Teacher._load
    monkeypatch.setattr(
        Teacher, "_load", lambda self, index: loaded.append(index) or load(self, index)
    )
    for cache_gb in (8.0, 2e-5, 1e-6):
        loaded.clear()
        variants(settings(run, teacher_file, streamed=True, cache_gb=cache_gb))
        read[cache_gb] = len(loaded) - 1  # the time of a block is measured on one
        assert damages(run) == expected
    assert read[8.0] <= 3 * 6 < read[2e-5] < read[1e-6]


def test_what_is_known_is_not_walked_again(run, teacher_file, monkeypatch):
    """The full model is the reference; medium may be what large is; an interval alone may be a
    named size."""
    passes, run_block = [], QwenImage.run_block

    def count(self, block, state):
        passes.append(state.image.device.type)
        return run_block(self, block, state)

    monkeypatch.setattr(QwenImage, "run_block", count)
    variants(settings(run, teacher_file))
    plan, batches = run.load_plan(), 4
    sets = {v.intervals for v in plan.variants if v.intervals and len(v.intervals) > 1}
    most = 6 + sum(6 - i.removed for i in plan.intervals)  # the teacher, and each interval alone
    most += sum(6 - sum(plan.interval(name).removed for name in chosen) for chosen in sets)
    timed = 5  # repeats of one block
    assert passes.count("cpu") <= batches * most + timed
