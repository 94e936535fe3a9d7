"""Files made sparse, and a released model's folder and its import."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppcl_engine import open_model
from ppcl_engine.settings.convert_settings import ImportConfig, SparsifyConfig
from ppcl_engine.stages.convert.import_released import import_released
from ppcl_engine.stages.convert.sparsify import sparsify

from ...tiny.released_models import (
    INTERVALS,
    KEPT,
    LISTS,
    TEACHER_BLOCKS,
    released_state,
    write_folder,
)
from ...tiny.sparsity import PLAIN


@pytest.fixture
def sparse(complete_run, tmp_path):
    """Makes a file sparse, in the fastest way where no other is asked for."""

    def make(path: Path, **settings) -> Path:
        given = {
            "calibration": complete_run.calibration,
            "run": tmp_path,
            "device": "cpu",
            "store": "float32",
            **PLAIN,
        }
        return sparsify(SparsifyConfig(path=path, **{**given, **settings}))

    return make


@pytest.fixture(scope="module")
def released_teacher(make_model):
    return make_model(num_layers=TEACHER_BLOCKS)


@pytest.fixture(scope="module")
def released_base(tmp_path_factory, released_teacher, save_model):
    return save_model(tmp_path_factory.mktemp("base") / "base.safetensors", released_teacher)


@pytest.fixture
def released_folder(tmp_path, architecture, released_teacher):
    """A released folder, with changes to its tensors or lists."""

    def make(
        change=lambda state: state,
        lists: dict | None = LISTS,
        kept: list[int] = KEPT,
        model=released_teacher,
    ):
        lists = lists or dict.fromkeys(LISTS, [])
        config = architecture.with_blocks(architecture.tiny_config, kept)
        return write_folder(
            tmp_path / "released", change(released_state(model, kept, lists)), config, lists
        )

    return make


@pytest.fixture
def imported(tmp_path, released_base):
    """Imports a released folder."""

    def make(path, **settings):
        settings = {
            "base": released_base,
            "intervals": INTERVALS,
            "store": "float32",
            "device": "cpu",
            **settings,
        }
        return import_released(ImportConfig(path=path, run=tmp_path / "run", **settings))

    return make


@pytest.fixture
def velocity(architecture, padded_inputs):
    return lambda *path, **options: architecture.call(
        open_model(*path, **options), padded_inputs(2)
    )
