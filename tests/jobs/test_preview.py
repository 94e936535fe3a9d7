"""preview.png: drawn from files, of what is trained so far, and no bit of the training knows of
it."""

from __future__ import annotations

import hashlib
import io
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.shared.teachers import NARROW, random_teacher, rendered
from ppcl_engine.data.calibration import CalibrationSet, save_calibration
from ppcl_engine.data.rendered.tables import fit_codec
from ppcl_engine.jobs.preview import (
    SHARE,
    Painter,
    Preview,
    can_paint,
    loss_curves,
    next_drawing,
    trained_so_far,
)
from ppcl_engine.jobs.spec import JobSpec, configs
from ppcl_engine.jobs.untrained import damage_curve
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import PruningPlan, parse_intervals
from ppcl_engine.report.drawings.preview_sheet import Row, sheet, smoothed
from ppcl_engine.run import Run
from ppcl_engine.stages import run_stage
from ppcl_engine.system import progress
from ppcl_engine.system.atomic import write_text
from ppcl_engine.system.tensor_files import write_tensors

from ..tiny.qwen_image_folder import build_tiny_pipeline


@pytest.fixture(scope="module")
def painting_teacher(tmp_path_factory):
    """A tiny random model that brings its codec."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    random_teacher(path, {**NARROW, "num_layers": 6}, seed=0, codec=fit_codec(0, samples=16))
    return path


def stages(model: Path) -> list[tuple[str, dict]]:
    common = {"model": str(model), "device": "cpu"}
    settings = {
        "distill-depth": {"rounds": 2, "updates": 3, "learning_rate": 1e-3},
        "polish": {"steps": 4, "save_every": 2, "learning_rate": 1e-3},
        "finetune": {"variant": "all", "steps": 2, "save_every": 1},
    }
    return [(stage, {**common, **own}) for stage, own in settings.items()]


class Drawing:
    """A listener that draws at every save, as a worker's does."""

    def __init__(self, preview: Preview):
        self.preview, self.drawn, self.names = preview, 0, []

    def advanced(self, what, step, steps, rate) -> None: ...

    def measured(self, what, step, loss) -> None:
        with open(self.preview.folder / "metrics.csv", "a") as file:
            file.write(f"0,{what},{step},{loss}\n")

    def saved(self) -> None:
        torch.rand(1)  # the stages' own generator is at another place every time
        self.preview._due = 0.0
        self.drawn += self.preview.draw(finished=False)
        trained = trained_so_far(self.preview.config, Weights(self.preview.config.model))
        self.names.append(trained and trained.label)


def work(folder: Path, model: Path, preview: Preview | None) -> Drawing | None:
    weights = Weights(model)
    save_calibration(Run(folder).calibration, rendered(model, weights, 16, 8, seed=0))
    plan = PruningPlan(
        architecture=weights.architecture.name,
        config=weights.config,
        num_blocks=weights.num_blocks,
        fingerprint=weights.fingerprint,
        intervals=parse_intervals("1-2 3-4"),
    )
    write_text(Run(folder).plan, plan.to_json())
    listener = Drawing(preview) if preview else None
    with progress.listening(listener):
        for stage, config in configs(JobSpec(stages=tuple(stages(model))), folder):
            if preview:
                preview.config = config
            run_stage(stage, config)
            if preview:
                assert preview.draw(finished=True)
    return listener


def bits(folder: Path) -> dict[str, str]:
    files = [
        f
        for part in ("depth", "polished", "tuned")
        for f in sorted((folder / part).rglob("*.safetensors"))
    ]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, painting_teacher):
    """(folder with previews, folder without, the listener)"""
    with_previews, without = tmp_path_factory.mktemp("with"), tmp_path_factory.mktemp("without")
    work(without, painting_teacher, None)
    listener = work(with_previews, painting_teacher, Preview(with_previews, 1.0, lambda: False))
    return with_previews, without, listener


def test_previews_change_no_bit(drawn):
    with_previews, without, listener = drawn
    assert bits(with_previews) == bits(without) and len(bits(without)) >= 3
    assert listener.drawn == len(listener.names) == 6


def test_what_is_trained_so_far_is_drawn(drawn):
    *_, listener = drawn
    assert listener.names[0].startswith("student\n") and listener.names[0].endswith("\nintervals")
    assert listener.names[2:] == ["polished\nstudent"] * 2 + ["all\nfine-tuned"] * 2


def test_the_picture_has_a_curve_and_two_rows_and_can_be_read_at_640(drawn):
    picture = Image.open(drawn[0] / "preview.png")
    assert 640 <= picture.width <= 1300 and 0.6 < picture.height / picture.width < 1.2
    assert not list(drawn[0].glob("*.partial"))
    rows = torch.rand(4, 3, 48, 48)
    whole = Image.open(
        io.BytesIO(
            sheet({"polish": {0: 1.0, 1: 0.5}}, [Row("teacher", rows), Row("student", rows)])
        )
    )
    assert whole.size == picture.size
    curve = Image.open(io.BytesIO(sheet({"polish": {0: 1.0, 1: 0.5}}, [])))
    assert curve.width == picture.width and curve.height < picture.height / 2


@pytest.mark.parametrize("count", [1, 6, 25])
def test_any_number_of_curves_is_drawn(count):
    curves = {
        f"interval {i}-{i + 1}": {step: 1.0 / (1 + step + i) for step in range(i % 5 + 1)}
        for i in range(count)
    }
    curves["text of block 9"] = {0: 0.0, 1: 0.0}  # nothing reads it
    assert Image.open(io.BytesIO(sheet(curves, []))).size[0] == 960
    assert Image.open(io.BytesIO(sheet({"nothing": {0: 0.0}}, []))).size[0] == 960


def test_smoothing_keeps_what_is_constant_and_ends():
    assert smoothed([0.25] * 100) == pytest.approx([0.25] * 100)
    assert smoothed([1.0, 2.0, 4.0]) == pytest.approx([1.0, 2.0, 4.0])


def test_an_update_that_was_done_again_counts_once(tmp_path):
    path = tmp_path / "metrics.csv"
    assert loss_curves(path) == {}
    path.write_text(
        "1,interval 3-4,0,0.5\n2,interval 3-4,1,0.4\n3,polish,0,0.9\n4,polish,1,0.8\n5,polish,1,0.7\n6,pol"
    )
    assert loss_curves(path) == {"polish": {0: 0.9, 1: 0.7}}


def test_only_small_models_that_bring_their_codec_are_drawn(
    painting_teacher, teacher_file, tmp_path
):
    ((_, config),) = configs(
        JobSpec(stages=(("probe", {"model": str(painting_teacher)}),)), tmp_path
    )
    assert can_paint(config)
    ((_, config),) = configs(JobSpec(stages=(("probe", {"model": str(teacher_file)}),)), tmp_path)
    assert not can_paint(config)


def test_drawing_ends_when_asked_and_takes_a_tenth_of_the_time(drawn, painting_teacher):
    folder, asked = drawn[0], []
    preview = Preview(folder, 0.01, lambda: bool(asked))
    preview.config = configs(JobSpec(stages=(stages(painting_teacher)[0],)), folder)[0][1]
    assert preview.draw(finished=True)
    assert next_drawing(begun=100.0, now=103.0, seconds=5.0) == 103.0 + SHARE * 3.0
    assert next_drawing(begun=100.0, now=100.1, seconds=5.0) == 105.1
    assert not Preview(folder, 60.0, lambda: False).draw(finished=False)  # too soon
    asked.append(1)
    assert not preview.draw(finished=True)
    preview._painter.asked = lambda: True
    asked.clear()
    before = (folder / "preview.png").read_bytes()
    assert not preview.draw(finished=True) and (folder / "preview.png").read_bytes() == before


def test_a_plan_is_drawn_before_any_training(drawn, painting_teacher, tmp_path):
    """The full model, and each size with students in closed form, below the damage of every number
    of blocks."""
    run = Run(tmp_path)
    shutil.copyfile(Run(drawn[0]).calibration, run.calibration)
    plan = Run(drawn[0]).load_plan()
    scored = tuple(
        replace(i, score=0.1 * n, correction="none") for n, i in enumerate(plan.intervals, start=1)
    )
    write_text(run.plan, plan.with_parts(intervals=scored, variants=()).to_json())
    error = torch.full((6, 3, 2), torch.nan, dtype=torch.float64)
    for u, j, damage in ((1, 1, 0.1), (3, 1, 0.2), (1, 2, 0.4)):
        error[u, j] = damage
    power = torch.ones(2, dtype=torch.float64)
    write_tensors(run.curves, {"error": error, "power": power}, gaps=True)
    spec = JobSpec(stages=(("detect", {"model": str(painting_teacher), "device": "cpu"}),))
    ((_, config),) = configs(spec, tmp_path)
    assert damage_curve(config, run) == pytest.approx({1: 0.1, 2: 0.3})
    preview = Preview(tmp_path, 0.01, lambda: False)
    preview.config = config
    assert not preview.draw(finished=False) and preview.draw(finished=True)
    whole = Image.open(tmp_path / "preview.png")
    rows = preview._painter.untrained_rows(config)
    assert [row.name.split(",")[0] for row in rows] == ["teacher", "large", "small"]
    assert whole.height > 2 * 150 * 2.7
    assert not torch.equal(rows[0].pictures, rows[-1].pictures)


def test_seconds_of_0_draw_nothing(drawn, painting_teacher):
    preview = Preview(drawn[0], 0.0, lambda: False)
    preview.config = configs(JobSpec(stages=(stages(painting_teacher)[0],)), drawn[0])[0][1]
    assert not preview.draw(finished=True)


def test_a_pipeline_folder_draws_with_its_vae(tmp_path, architecture):
    model = build_tiny_pipeline(tmp_path / "model")
    weights = Weights(model)
    inputs = architecture.random_inputs(weights.config, 5, (1, 2, 3), 4, "cpu")
    inputs["encoder_hidden_states_mask"][0, 1:] = False  # an empty caption, which is not drawn
    origin = {"architecture": architecture.name, "fingerprint": weights.fingerprint}
    save_calibration(Run(tmp_path).calibration, CalibrationSet([inputs], origin))
    ((_, config),) = configs(
        JobSpec(stages=(("distill-depth", {"model": str(model), "device": "cpu"}),)), tmp_path
    )
    assert can_paint(config)
    pictures = Painter(config, lambda: False).teacher
    assert pictures.shape == (4, 3, 16, 24) and 0 <= pictures.min() < pictures.max() <= 1
