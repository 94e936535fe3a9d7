"""Baselines on a model whose last block is of a kind of its own: no method removes it."""

from __future__ import annotations

import importlib

import pytest
import torch

from benchmarks.baselines import BASELINES, Task
from benchmarks.baselines.base import model_of
from benchmarks.baselines.chain import Budget
from ppcl_engine.models.streaming import Teacher
from ppcl_engine.models.weights import Weights

pytestmark = pytest.mark.parametrize("architecture", ["sd35"], indirect=True)


@pytest.fixture(scope="module")
def task(architecture, tmp_path_factory, make_model, save_model, calibration_of):
    path = save_model(
        tmp_path_factory.mktemp("sd35") / "teacher.safetensors", make_model(num_layers=12)
    )
    teacher = Teacher(Weights(path), torch.float32, "cpu", streamed=False)
    return Task(
        teacher=teacher,
        calibration=calibration_of(path, batches=2),
        remove=7,
        learning_rate=1e-3,
        seed=1,
    )


@pytest.mark.parametrize("name", BASELINES)
def test_the_last_block_stays(task, architecture, padded_inputs, name):
    assert task.quotas == ((range(11), 7), (range(11, 12), 0))
    removed = importlib.import_module(f"benchmarks.baselines.{name}").select(task, Budget(6000))
    assert len(removed) == 7 and max(removed) < 11
    pruned = BASELINES[name](task, Budget(300), removed)
    velocity = architecture.call(
        model_of(architecture, task.teacher.config, pruned, 12), padded_inputs()
    )
    assert velocity.isfinite().all() and len(pruned.losses) > 1
