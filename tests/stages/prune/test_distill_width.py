"""Width: closed forms over the whole set, trained further, resumed to the bit, switched with no
training."""

from __future__ import annotations

import json

import pytest
import torch

from ppcl_engine.algorithms import least_squares
from ppcl_engine.algorithms.detection import width_fits
from ppcl_engine.algorithms.distillation.trainer import saved_weights
from ppcl_engine.data.calibration import load_calibration
from ppcl_engine.models.assembly import open_variant, placed_block
from ppcl_engine.models.layout import Place, layout_of
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import parse_intervals
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import ExportConfig
from ppcl_engine.settings.prune_settings import DetectWidthConfig, DistillWidthConfig
from ppcl_engine.stages.convert.export import export
from ppcl_engine.stages.inputs import RunStudents
from ppcl_engine.stages.prune.detect_width import detect_width
from ppcl_engine.stages.prune.distill_width import distill_width
from ppcl_engine.system.atomic import write_text
from ppcl_engine.system.interruption import Stopped
from ppcl_engine.system.tensor_files import TensorFile

SITES = "text:2-3 ffn_image:0 ffn_image:4 ffn_text:1"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, teacher_file, make_run, run_stages) -> Run:
    """A run with students for 2-3 and 4-5."""
    run = run_stages(
        teacher_file, make_run(tmp_path_factory.mktemp("width"), teacher_file), "probe", "detect"
    )
    plan = run.load_plan().with_parts(intervals=parse_intervals("2-3 4-5"))
    write_text(run.plan, plan.to_json())
    return run_stages(teacher_file, run.folder, "distill_depth")


@pytest.fixture
def new_run(trained, tmp_path):
    """A copy of the run without projections."""

    def make(name: str = "run") -> Run:
        run = Run(tmp_path / name)
        run.folder.mkdir()
        for path in (trained.calibration, trained.students):
            (run.folder / path.name).symlink_to(path)
        run.plan.write_text(trained.plan.read_text())
        return run

    return make


def distil(run: Run, teacher_file, **options) -> Run:
    options = {
        "rounds": 2,
        "updates": 6,
        "warm_up": 2,
        "learning_rate": 1e-3,
        "sites": SITES,
        **options,
    }
    distill_width(DistillWidthConfig(model=teacher_file, run=run.folder, device="cpu", **options))
    return run


def projection_files(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.projections.iterdir())}


def test_the_start_is_the_ridge_solution_over_the_whole_set(new_run, teacher_file, architecture):
    """An FFN of the teacher's block, one of a student, both forms, and text, against numpy-like
    algebra."""
    for form in ("paper", "gated"):
        run = distil(new_run(form), teacher_file, rounds=0, form=form)
        weights, students = (
            Weights(teacher_file),
            RunStudents(run, Weights(teacher_file).config, architecture),
        )
        model = open_model(teacher_file)
        intervals = {i.first: i for i in run.load_plan().intervals}
        for name, index, stream in (
            ("0.ffn_image", 0, "image"),
            ("4-5.ffn_image", 4, "image"),
            ("1.ffn_text", 1, "text"),
        ):
            place = Place(index=index, interval=intervals.get(index) if "-" in name else None)
            block = placed_block(weights, students, place, torch.float32, "cpu", {})
            xs, ys = [], []
            for inputs in load_calibration(run.calibration).all_inputs():
                state = architecture.embed(model, inputs)
                for before in range(index):
                    state = architecture.run_block(model.transformer_blocks[before], state)
                _, seen = architecture.observe(block, state)
                x, y = (
                    (seen[f"{stream}_ffn_input"], seen[f"{stream}_ffn_output"])
                    if form == "gated"
                    else (
                        seen[f"{stream}_before_ffn"],
                        seen[f"{stream}_after_ffn"] - seen[f"{stream}_before_ffn"],
                    )
                )
                xs.append(x[state.real(stream)]), ys.append(y[state.real(stream)])
            x, y = torch.cat(xs).double(), torch.cat(ys).double()
            centred, target = x - x.mean(0), y - y.mean(0)
            ridge = torch.diag(1e-4 * centred.square().sum(0))
            weight = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ target).T
            saved = saved_weights(run.projections / f"{name}.safetensors")
            torch.testing.assert_close(saved["map.weight"].double(), weight, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(
                saved["map.bias"].double(), y.mean(0) - weight @ x.mean(0), rtol=1e-3, atol=1e-3
            )


def test_training_lowers_every_loss_and_leaves_the_rest_alone(new_run, teacher_file):
    # four times over the same ten batches
    run = distil(new_run(), teacher_file, rounds=1, updates=40)
    names = {path.stem for path in run.projections.iterdir()}
    assert names == {
        "2-3.text",
        "2.text",
        "3.text",
        "0.ffn_image",
        "4-5.ffn_image",
        "4.ffn_image",
        "1.ffn_text",
    }
    for path in run.projections.iterdir():
        file = TensorFile(path)
        losses = file.read("losses")
        assert int(file.metadata["step"]) == 40 and losses[-10:].mean() < losses[:10].mean(), (
            path.name
        )
    assert set(saved_weights(run.projections / "2-3.text.safetensors")) == {
        "map.weight",
        "map.bias",
        "step.weight",
        "step.bias",
    }
    assert "step.weight" not in saved_weights(run.projections / "2.text.safetensors")


def test_interrupted_training_ends_in_the_same_bits(new_run, teacher_file, monkeypatch):
    whole = projection_files(distil(new_run("whole"), teacher_file))
    run, calls = new_run("stopped"), []
    from contextlib import contextmanager

    from ppcl_engine.stages.prune import distill_width as stage

    @contextmanager
    def stops_at_once():
        yield lambda: calls.append(1) or len(calls) % 5 == 0

    monkeypatch.setattr(stage, "stop_on_interrupt", stops_at_once)
    stops = 0
    while True:
        try:
            distil(run, teacher_file)
            break
        except Stopped:
            stops += 1
    assert stops > 5 and projection_files(run) == whole


def test_streamed_and_resident_are_the_same_bits(new_run, teacher_file):
    resident = distil(new_run("resident"), teacher_file)
    streamed = distil(new_run("streamed"), teacher_file, streamed=True, cache_gb=1e-3)
    resident = distil(new_run("small_cache"), teacher_file, cache_gb=1e-3)
    assert projection_files(streamed) == projection_files(resident)
    assert not list(streamed.states.glob("*"))


def test_sites_switch_without_training(new_run, teacher_file, architecture, padded_inputs):
    """Every subset opens from the bundle; giving back an interval inside a group uses its blocks'
    own projections."""
    run = distil(new_run(), teacher_file)
    plan = run.load_plan()
    bundle = export(ExportConfig(model=teacher_file, run=run.folder, store="float32"))
    inputs, full = padded_inputs(3), open_model(teacher_file)
    assert torch.equal(
        architecture.call(open_model(bundle, "full", teacher_file), inputs),
        architecture.call(full, inputs),
    )
    students = RunStudents(run, Weights(teacher_file).config, architecture)
    seen = []
    for name in (
        "2-3,4-5,text:2-3,ffn_image:0,ffn_image:4,ffn_text:1",
        "4-5,text:2-3",
        "text:2-3",
        "ffn_image:4",
        "2-3",
    ):
        variant = plan.variant(name)
        assert not layout_of(plan, variant).notes
        ours = open_variant(Weights(teacher_file), students, plan, variant, torch.float32, "cpu")
        opened = open_model(bundle, name, teacher_file)
        seen.append(architecture.call(opened, inputs))
        assert torch.equal(architecture.call(ours, inputs), seen[-1])
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_a_standalone_with_everything_on_is_the_variant(
    new_run, teacher_file, architecture, padded_inputs
):
    run = distil(new_run(), teacher_file)
    name = ",".join([*run.load_plan().everything().intervals, *run.load_plan().everything().sites])
    bundle = export(ExportConfig(model=teacher_file, run=run.folder, store="float32"))
    path = export(
        ExportConfig(
            model=teacher_file,
            run=run.folder,
            layout="ppcl",
            variant=name,
            store="float32",
            name="one",
        )
    )
    ours, inputs = open_model(path), padded_inputs(3)
    assert torch.equal(
        architecture.call(ours, inputs),
        architecture.call(open_model(bundle, name, teacher_file), inputs),
    )
    with pytest.raises(ValueError, match="has width site .*stock comfyui cannot run"):
        export(
            ExportConfig(model=teacher_file, run=run.folder, layout="comfyui", variant="ffn_text:1")
        )


def test_without_own_projections_a_group_goes_off_and_says_so(new_run, teacher_file):
    run = distil(new_run(), teacher_file, give_back=False, rounds=0)
    plan = run.load_plan()
    layout = layout_of(plan, plan.variant("4-5,text:2-3"))
    assert layout.notes == ("text:2-3 is off: no projection was trained for block 2",)


def test_a_rank_deficient_fit_warns_and_uses_the_ridge(
    new_run, teacher_file, make_run, calibration_of, capsys
):
    few = calibration_of(teacher_file, batches=2, samples=2)
    run = make_run(new_run("few").folder.parent / "tiny", teacher_file, few)
    run = Run(run)
    (run.folder / "depth").symlink_to(new_run("other").students)
    run.plan.write_text(new_run("third").plan.read_text())
    distil(run, teacher_file, rounds=0, sites="text:1")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert any(
        "text of block 1 (map) is rank-deficient: rank" in line and "the ridge decides" in line
        for line in lines
    )
    assert all(
        torch.isfinite(t).all()
        for t in saved_weights(run.projections / "1.text.safetensors").values()
    )


BAD = {
    "no such block": ("ffn_image:9", "ffn_image:9: there are blocks 0-5"),
    "not a site": ("heads:3", "'heads:3' is not a width site"),
    "no block before": ("text:0", "has no full block before it"),
    "inside an interval": ("ffn_image:3", "inside interval 2-3, whose student is block 2"),
    "cuts an interval": ("text:1-2", "cuts interval 2-3"),
}


@pytest.mark.parametrize("sites, message", BAD.values(), ids=BAD)
def test_bad_sites_are_one_line(new_run, teacher_file, sites, message):
    with pytest.raises(ValueError, match=message):
        distil(new_run(), teacher_file, sites=sites)


def test_no_sites_at_all(new_run, teacher_file):
    with pytest.raises(ValueError, match="no width sites; run detect-width first"):
        distil(new_run(), teacher_file, sites="")


@pytest.mark.parametrize("method", ["damage", "cka"])
def test_detected_sites_meet_the_budget(new_run, teacher_file, method, architecture):
    run = new_run()
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


def test_any_memory_gives_the_same_candidates(new_run, teacher_file, monkeypatch):
    """Fits are summed in one sweep or in many, their maps lie in memory or on disk, models go
    through the blocks together or apart."""
    found, chunks, chunked = {}, [], width_fits._chunks
    monkeypatch.setattr(
        width_fits,
        "_chunks",
        lambda *given: [chunks.append(1) or chunk for chunk in chunked(*given)],
    )
    for name, options in (
        ("resident", {}),
        ("streamed", {"streamed": True}),
        ("tight", {"streamed": True, "cache_gb": 4e-5}),
    ):
        run = new_run(name)
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
    new_run, teacher_file, monkeypatch
):
    """62.7 GB at full size otherwise: every solution in float64, the text of every source to the
    end."""
    held, step = [], width_fits._Accumulation._step

    def count(self, *given):
        held.append(len({place for place, _ in self.source_seen}))
        return step(self, *given)

    monkeypatch.setattr(width_fits._Accumulation, "_step", count)
    run = new_run()
    config = DetectWidthConfig(
        model=teacher_file, run=run.folder, device="cpu", share=0.65, longest=1, kinds="text"
    )
    kept, add = [], width_fits.Solutions.add
    monkeypatch.setattr(
        width_fits.Solutions, "add", lambda self, *given: add(self, *given) or kept.append(self)
    )
    detect_width(config)
    assert max(held) == 2  # a source, and the one that its own group reads from
    for parts in kept[-1].without_maps().values():
        for solution in parts.values():
            assert {t.dtype for t in (solution.weight, solution.bias)} == {torch.float32}
            assert solution.weight.device.type == "cpu"


def test_inputs_of_a_source_are_summed_once(new_run, teacher_file, monkeypatch):
    made, init = [], least_squares.InputMoments.__init__
    monkeypatch.setattr(
        least_squares.InputMoments,
        "__init__",
        lambda self, *given: made.append(1) or init(self, *given),
    )
    run = new_run()
    detect_width(
        DetectWidthConfig(
            model=teacher_file, run=run.folder, device="cpu", share=0.6, kinds="text ffn_image"
        )
    )
    candidates = json.loads(run.width.read_text())["candidates"]
    ffns = sum(c["name"].startswith("ffn") for c in candidates)
    # of each of three sources: what groups read, and what their ends step from
    assert ffns < len(made) <= ffns + 2 * 3


def test_damage_of_a_candidate_is_that_of_its_model(new_run, teacher_file, architecture):
    """The score in width.json against the assembled models' own forwards."""
    run = new_run()
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
