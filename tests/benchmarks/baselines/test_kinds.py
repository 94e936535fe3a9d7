"""Baselines on a model of two kinds of blocks: the same share of each, so the same parameters."""

from __future__ import annotations

import importlib

import pytest
import torch

from benchmarks.baselines import BASELINES, Task
from benchmarks.baselines.chain import Budget
from benchmarks.baselines.tinyfusion import task_groups
from ppcl_engine.models.streaming import Teacher
from ppcl_engine.models.weights import Weights, parameter_count

pytestmark = pytest.mark.parametrize("architecture", ["flux1"], indirect=True)


@pytest.fixture(scope="module")
def flux_task(architecture, tmp_path_factory, make_model, save_model, calibration_of):
    """8 double and 4 single blocks."""
    model = make_model(num_layers=8, num_single_layers=4)
    path = save_model(tmp_path_factory.mktemp("flux") / "teacher.safetensors", model)
    teacher = Teacher(Weights(path), torch.float32, "cpu", streamed=False)
    calibration = calibration_of(path, batches=2)
    return Task(teacher=teacher, calibration=calibration, remove=3, learning_rate=1e-3, seed=1)


def test_quotas_are_shares_of_each_kind(flux_task):
    assert [(blocks, count) for blocks, count in flux_task.quotas] == [
        (range(8), 2),
        (range(8, 12), 1),
    ]
    groups = task_groups(flux_task)
    assert [i for blocks, _ in groups for i in blocks] == list(range(12))
    assert not any({7, 8} <= set(blocks) for blocks, _ in groups)


@pytest.mark.parametrize("name", BASELINES)
def test_every_method_removes_the_same_parameters(flux_task, name):
    module = importlib.import_module(f"benchmarks.baselines.{name}")
    removed = module.select(flux_task, Budget(3000))
    assert [sum(i in blocks for i in removed) for blocks, _ in flux_task.quotas] == [2, 1]
    pruned = BASELINES[name](flux_task, Budget(300), removed)
    sizes = [parameter_count(block) for block in pruned.blocks.values()]
    assert len(sizes) == 9 and len(set(sizes)) == 2 and len(pruned.losses) > 1
    assert sizes == sorted(sizes, reverse=True)
