"""A tiny task, and one whose teacher has a block that does nothing."""

from __future__ import annotations

import pytest
import torch

from benchmarks.baselines import Task
from ppcl_engine.models.streaming import Teacher
from ppcl_engine.models.weights import Weights

IDENTITY = 3  # the planted teacher's block that returns its input


@pytest.fixture(scope="session")
def teacher(teacher_file):
    return Teacher(Weights(teacher_file), torch.float32, "cpu", streamed=False)


@pytest.fixture(scope="session")
def task(teacher, teacher_file, calibration_of):
    calibration = calibration_of(teacher_file, batches=2)
    return Task(teacher=teacher, calibration=calibration, remove=2, learning_rate=1e-3, seed=1)


@pytest.fixture(scope="session")
def planted(tmp_path_factory, make_model, save_model, calibration_of):
    model = make_model(seed=7)
    block = model.transformer_blocks[IDENTITY]
    for last in (
        block.attn.to_out[0],
        block.attn.to_add_out,
        block.img_mlp.net[2],
        block.txt_mlp.net[2],
    ):
        last.weight.zero_()
        last.bias.zero_()
    path = save_model(tmp_path_factory.mktemp("planted") / "teacher.safetensors", model)
    teacher = Teacher(Weights(path), torch.float32, "cpu", streamed=False)
    return Task(
        teacher=teacher,
        calibration=calibration_of(path, batches=2),
        remove=1,
        learning_rate=1e-3,
        seed=0,
    )
