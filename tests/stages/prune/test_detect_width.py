"""Width sites are chosen within a budget, by what their model really damages, in any memory."""

from __future__ import annotations

import json

import pytest
import torch

from ppcl_engine.algorithms import least_squares
from ppcl_engine.algorithms.detection import width_solutions
from ppcl_engine.data.calibration import load_calibration
from ppcl_engine.models.assembly import open_variant
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.weights import Weights
from ppcl_engine.settings.prune_settings import DetectWidthConfig
from ppcl_engine.stages.prune.detect_width import detect_width
from ppcl_engine.stages.run_students import RunStudents
from ppcl_engine.system.tensor_files import TensorFile

from ...tiny.distilled_width import distil


@pytest.mark.parametrize("method", ["damage", "cka"])
def test_detected_sites_meet_the_budget(width_run, teacher_file, method, architecture):
    run = width_run()
    settings = {
        "model": teacher_file,
        "run": run.folder,
        "device": "cpu",
        "method": method,
        "share": 0.55,
    }
    detect_width(DetectWidthConfig(**settings))
    plan, found = run.load_plan(), json.loads(run.width.read_text())
    assert plan.sites and {c["name"] for c in found["candidates"] if c["chosen"]} == {
        s.name for s in plan.switches
    }
    distil(run, teacher_file, sites="", rounds=1)
    students = RunStudents(run, Weights(teacher_file).config, architecture)
    small = open_variant(
        Weights(teacher_file), students, plan, plan.everything(), torch.float32, "cpu"
    )
    full = sum(p.numel() for p in open_model(teacher_file).parameters())
    assert sum(p.numel() for p in small.parameters()) <= 0.55 * full
    alignment = TensorFile(run.alignment).read_all()
    assert alignment["text"].shape == (4, 4) and torch.allclose(
        alignment["text"].diagonal(), torch.ones(4).double()
    )
    with pytest.raises(ValueError, match="above --share; raise it"):
        detect_width(DetectWidthConfig(**{**settings, "share": 0.1}))
    with pytest.raises(
        ValueError, match="the intervals alone leave .* of the parameters, no more than --share 0.9"
    ):
        detect_width(DetectWidthConfig(**{**settings, "share": 0.9}))


def test_any_memory_gives_the_same_candidates(width_run, teacher_file, monkeypatch):
    """Fits are summed in one sweep or in many, their maps lie in memory or on disk, models go
    through the blocks together or apart."""
    found, chunks, chunked = {}, [], width_solutions._chunks
    monkeypatch.setattr(
        width_solutions,
        "_chunks",
        lambda *given: [chunks.append(1) or chunk for chunk in chunked(*given)],
    )
    for name, options in (
        ("resident", {}),
        ("streamed", {"streamed": True}),
        ("tight", {"streamed": True, "cache_gb": 4e-5}),
    ):
        run = width_run(name)
        chunks.clear()
        detect_width(
            DetectWidthConfig(
                model=teacher_file, run=run.folder, device="cpu", share=0.6, **options
            )
        )
        found[name] = (run.width.read_bytes(), run.alignment.read_bytes(), run.plan.read_bytes())
        assert len(chunks) > 5 if name == "tight" else len(chunks) == 1
        assert not run.states.exists() or not list(run.states.iterdir())
    assert found["resident"] == found["streamed"] == found["tight"]


def test_maps_leave_the_device_in_float32_and_sources_are_let_go(
    width_run, teacher_file, monkeypatch
):
    """62.7 GB at full size otherwise: every solution in float64, the text of every source to the
    end."""
    held, step = [], width_solutions._Accumulation._step

    def count(self, *given):
        held.append(len({place for place, _ in self.source_seen}))
        return step(self, *given)

    monkeypatch.setattr(width_solutions._Accumulation, "_step", count)
    run = width_run()
    config = DetectWidthConfig(
        model=teacher_file, run=run.folder, device="cpu", share=0.65, longest=1, kinds="text"
    )
    kept, add = [], width_solutions.Solutions.add
    monkeypatch.setattr(
        width_solutions.Solutions,
        "add",
        lambda self, *given: add(self, *given) or kept.append(self),
    )
    detect_width(config)
    assert max(held) == 2  # a source, and the one that its own group reads from
    for parts in kept[-1].without_maps().values():
        for solution in parts.values():
            assert {t.dtype for t in (solution.weight, solution.bias)} == {torch.float32}
            assert solution.weight.device.type == "cpu"


def test_inputs_of_a_source_are_summed_once(width_run, teacher_file, monkeypatch):
    made, init = [], least_squares.InputMoments.__init__
    monkeypatch.setattr(
        least_squares.InputMoments,
        "__init__",
        lambda self, *given: made.append(1) or init(self, *given),
    )
    run = width_run()
    detect_width(
        DetectWidthConfig(
            model=teacher_file, run=run.folder, device="cpu", share=0.6, kinds="text ffn_image"
        )
    )
    candidates = json.loads(run.width.read_text())["candidates"]
    ffns = sum(c["name"].startswith("ffn") for c in candidates)
    # of each of three sources: what groups read, and what their ends step from
    assert ffns < len(made) <= ffns + 2 * 3


def test_damage_of_a_candidate_is_that_of_its_model(width_run, teacher_file, architecture):
    """The score in width.json against the assembled models' own forwards."""
    run = width_run()
    detect_width(
        DetectWidthConfig(
            model=teacher_file, run=run.folder, device="cpu", share=0.6, samples=1000, form="gated"
        )
    )
    chosen = [
        c for c in json.loads(run.width.read_text())["candidates"] if c["name"] == "ffn_image:0"
    ][0]
    distil(run, teacher_file, sites="ffn_image:0", form="gated", rounds=0)
    plan, weights = run.load_plan(), Weights(teacher_file)
    students = RunStudents(run, weights.config, architecture)
    models = [
        open_variant(weights, students, plan, plan.variant(n), torch.float32, "cpu")
        for n in ("2-3,4-5,ffn_image:0", "2-3,4-5")
    ]
    inputs = load_calibration(run.calibration).all_inputs()
    ours, theirs = (torch.cat([architecture.call(m, row) for row in inputs]) for m in models)
    assert chosen["score"] == pytest.approx(
        float((ours - theirs).square().sum() / theirs.square().sum()), rel=1e-3
    )
