"""A run with every kind of part and its files, a file folded at a tiny schedule, and what a model
gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import ExportConfig, FoldConfig
from ppcl_engine.stages.convert.export import export
from ppcl_engine.stages.convert.fold import fold

from ..tiny.trained_run import tuned_run

STEPS = 4


@pytest.fixture(scope="session")
def complete_run(tmp_path_factory, teacher_file, make_run) -> Run:
    """Students of both forms, projections of all kinds, a tuned variant with a time embedder of its
    own."""
    return tuned_run(make_run(tmp_path_factory.mktemp("run"), teacher_file), teacher_file)


@pytest.fixture(scope="session")
def complete_bundle(complete_run, teacher_file) -> Path:
    return export(ExportConfig(model=teacher_file, run=complete_run.folder, store="float32"))


@pytest.fixture(scope="session")
def exported(complete_run, teacher_file):
    """A file of that run."""

    def make(layout: str, variant: str = "smallest"):
        return export(
            ExportConfig(
                model=teacher_file,
                run=complete_run.folder,
                layout=layout,
                variant=variant,
                store="float32",
                name=variant.replace(",", "_").replace(":", "_"),
            )
        )

    return make


@pytest.fixture
def folded(tmp_path):
    def make(path, form: str, **settings):
        given = {
            "steps": str(STEPS),
            "dtype": "float32",
            "samples": "1 3",
            "bound": 0.5,
            "device": "cpu",
        }
        return fold(FoldConfig(path=path, form=form, run=tmp_path, **{**given, **settings}))

    return make


@pytest.fixture
def output(architecture, padded_inputs):
    """What a model gives for some samples at a timestep."""

    def run(model, samples: int = 3, t: float = 0.75) -> torch.Tensor:
        with torch.no_grad():
            return architecture.call(
                model, {**padded_inputs(samples=samples), "timestep": torch.full((samples,), t)}
            )

    return run
