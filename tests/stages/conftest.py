"""A file folded at a tiny schedule, and what a model gives."""

from __future__ import annotations

import pytest
import torch

from ppcl_engine.settings.convert_settings import FoldConfig
from ppcl_engine.stages.convert.fold import fold

STEPS = 4


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
