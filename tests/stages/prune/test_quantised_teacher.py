"""A teacher in GGUF, streamed: it is calibrated, probed, detected on and distilled from, and its
bundle opens on it."""

from __future__ import annotations

import json

import pytest
import torch

from ppcl_engine.models.opening import open_model
from ppcl_engine.models.tensor_sources import Source, comfyui_sources, write_gguf_sources
from ppcl_engine.models.weights import Weights
from ppcl_engine.settings.convert_settings import ExportConfig
from ppcl_engine.stages.convert.export import export


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, teacher_file, architecture):
    weights = Weights(teacher_file)
    sources = {k: Source(weights.shape(k), lambda k=k: weights.read(k)) for k in weights.keys()}
    path = tmp_path_factory.mktemp("gguf") / "teacher.gguf"
    named = comfyui_sources(architecture, sources)
    metadata = {"config": json.dumps(weights.config)}
    write_gguf_sources(path, architecture, named, "q8_0", metadata, {})
    return path


def test_from_probe_to_a_bundle(
    teacher, teacher_file, tmp_path, make_run, run_stages, architecture, padded_inputs
):
    folder = make_run(tmp_path, teacher)
    stages = ("probe", "detect", "distill_depth", "variants")
    run = run_stages(teacher, folder, *stages, streamed=True, rounds=1)
    assert run.load_plan().fingerprint == Weights(teacher).fingerprint
    bundle = export(ExportConfig(model=teacher, run=folder, store="float32"))
    with torch.no_grad():
        full = architecture.call(open_model(bundle, "full", teacher), padded_inputs(3))
        assert torch.equal(full, architecture.call(open_model(teacher), padded_inputs(3)))
        small = architecture.call(open_model(bundle, "small", teacher), padded_inputs(3))
    assert small.isfinite().all()
    assert not torch.equal(small, full)
    with pytest.warns(UserWarning, match="cannot be compared"):  # same vectors, other bits
        open_model(bundle, "small", teacher_file)
