"""What version 0.1.0 wrote, before the engine's files were sorted into folders, is read today.

`runs-0.1.0.zip` holds a random teacher of four blocks, a finished job (probe to export), a job that
was cancelled while it distilled, and the velocity that the finished job's bundle gave.
"""

import zipfile
from pathlib import Path

import pytest
import torch

from ppcl_engine import open_model
from ppcl_engine.architectures import architecture_named
from ppcl_engine.data.calibration import load_calibration
from ppcl_engine.jobs import attempt
from ppcl_engine.jobs.state import current_state, finished_stages, read_events
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import ExportConfig
from ppcl_engine.stages.convert.export import export
from ppcl_engine.system.tensor_files import TensorFile

ARCHIVE = Path(__file__).with_name("runs-0.1.0.zip")
BUNDLE = Path("exports", "pruned.ppcl.safetensors")


@pytest.fixture
def runs(tmp_path) -> Path:
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    return tmp_path


def test_a_bundle_gives_the_same_velocity(runs):
    inputs = load_calibration(runs / "done" / "calibration.safetensors").inputs(0)
    architecture = architecture_named("qwen_image")
    expected = TensorFile(runs / "expected.safetensors").read_all()
    assert set(expected) == {"full", "all"}
    for variant, velocity in expected.items():
        model = open_model(runs / "done" / BUNDLE, variant, base=runs / "teacher.safetensors")
        with torch.no_grad():
            torch.testing.assert_close(architecture.call(model, inputs), velocity)


def test_a_run_folder_exports_the_same_tensors(runs):
    run = Run(runs / "done")
    export(
        ExportConfig(
            model=runs / "teacher.safetensors",
            run=run.folder,
            device="cpu",
            store="float32",
            name="again",
        )
    )
    before = TensorFile(run.folder / BUNDLE)
    after = TensorFile(run.folder / "exports" / "again.ppcl.safetensors")
    assert set(before.keys()) == set(after.keys())
    for name in before.keys():
        assert torch.equal(after.read(name), before.read(name)), name


def test_a_finished_job_is_known_as_finished(runs):
    state = current_state(runs / "done")
    assert state.status == "done" and finished_stages(read_events(runs / "done")) == 7


def test_a_cancelled_job_goes_on(runs):
    (runs / "stopped").rename(runs / "distil-0123abcd")
    teacher = runs / "teacher.safetensors"
    done = attempt.main([str(runs / "distil-0123abcd"), "--again", "--model", str(teacher)])
    state = current_state(runs / "distil-0123abcd-2")
    assert (done, state.status, state.error) == (0, "done", "")
    students = TensorFile(runs / "distil-0123abcd-2" / "depth" / "2-3.safetensors")
    assert all(torch.isfinite(students.read(name)).all() for name in students.keys())
