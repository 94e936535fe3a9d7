"""Several processes: what one process gives, within float tolerance (rows shared) or to the bit
(intervals shared)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ppcl_engine
from ppcl_engine.__main__ import USER_ERROR, main
from ppcl_engine.jobs.attempt import main as worker
from ppcl_engine.jobs.spec import JobSpec, write_spec
from ppcl_engine.jobs.state import ask_to_cancel, current_state, read_events
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import PruningPlan, parse_intervals
from ppcl_engine.run import Run
from ppcl_engine.system.early import INTERRUPTED
from ppcl_engine.system.tensor_files import TensorFile

from ..tiny.processes import Launched, command, free_port, relative
from ..tiny.trained_run import poison

TOLERANCE = 1e-4  # of every tensor, relative, after all updates
RUN_FILE = """
[common]
model = "{model}"
run = "{run}"
device = "cpu"

[probe]
train_steps = 3
{parallel}

[detect]
remove = 3
longest = 3
bootstrap = 5

[distill-depth]
rounds = 3
updates = 8
learning_rate = 1e-3
warm_up = 2
{parallel}

[detect-width]
share = 0.4
longest = 2
samples = 6
form = "gated"

[distill-width]
rounds = 2
updates = 6
learning_rate = 1e-3
warm_up = 2
{parallel}

[polish]
steps = 6
learning_rate = 1e-3
warm_up = 2

[finetune]
variant = "all"
name = "tuned"
steps = 4
data = 0.5
"""


@pytest.fixture(scope="module")
def write_run_file(teacher_file, make_run):
    def write(folder: Path, parallel: str = "data") -> Path:
        make_run(folder / "run", teacher_file)
        text = RUN_FILE.format(
            model=teacher_file, run=folder / "run", parallel=f'parallel = "{parallel}"'
        )
        (folder / "run.toml").write_text(text)
        return folder / "run.toml"

    return write


@pytest.fixture(scope="module")
def alone(tmp_path_factory, write_run_file) -> Run:
    """The whole method in one process."""
    path = write_run_file(tmp_path_factory.mktemp("alone"))
    assert main(["run", str(path)]) == 0
    return Run(path.parent / "run")


@pytest.fixture(scope="module")
def planned(tmp_path_factory, architecture, teacher_file, make_run, calibration_of):
    """A run folder with a plan, no detection needed, and the command that trains its students."""

    def make(samples: int = 6) -> tuple[Run, list]:
        calibration = calibration_of(teacher_file, samples=samples)
        run, weights = (
            Run(make_run(tmp_path_factory.mktemp("run"), teacher_file, calibration)),
            Weights(teacher_file),
        )
        plan = PruningPlan(
            architecture=architecture.name,
            config=weights.config,
            num_blocks=weights.num_blocks,
            fingerprint=weights.fingerprint,
            intervals=parse_intervals("0-1 2-4"),
        )
        run.plan.write_text(plan.to_json())
        options = [
            "--rounds",
            3,
            "--updates",
            16,
            "--warm-up",
            2,
            "--learning-rate",
            1e-3,
            "--device",
            "cpu",
        ]
        return run, ["distill-depth", "--model", teacher_file, "--run", run.folder, *options]

    return make


@pytest.fixture(scope="module")
def students(planned) -> Run:
    """What one process trains."""
    run, arguments = planned()
    assert main([str(a) for a in arguments]) == 0
    return run


def farthest(run: Run, other: Run, *folders: str) -> float:
    """Largest relative difference of a tensor in the files of these folders. They hold the same
    tensors."""
    found = [0.0]
    for folder in folders:
        paths = sorted((other.folder / folder).rglob("*.safetensors"))
        assert paths and len(paths) == len(list((run.folder / folder).rglob("*.safetensors")))
        for path in paths:
            ours = TensorFile(run.folder / path.relative_to(other.folder)).read_all()
            theirs = TensorFile(path).read_all()
            assert ours.keys() == theirs.keys()
            found += [relative(ours[name], theirs[name]) for name in theirs]
    return max(found)


def contents(run: Run, *folders: str) -> dict[str, bytes]:
    files = [path for folder in folders for path in (run.folder / folder).rglob("*.safetensors")]
    return {str(path.relative_to(run.folder)): path.read_bytes() for path in files}


def test_the_whole_method_under_accelerate_launch(tmp_path, write_run_file, alone):
    """Rows shared by two processes; detect and detect-width are the main one's, while the other
    waits."""
    path = write_run_file(tmp_path)
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    ]
    launcher += ["--main_process_port", str(free_port()), "-m", "ppcl_engine", "run", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        launcher,
        cwd=Path(ppcl_engine.__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "probe",
        "detect",
        "distill-depth",
        "detect-width",
        "distill-width",
        "polish",
        "finetune",
    ]
    run = Run(tmp_path / "run")
    assert farthest(run, alone, "probes", "depth", "width", "polished", "tuned") < TOLERANCE
    assert figures(run) == [
        (name, pytest.approx(score, rel=TOLERANCE)) for name, score in figures(alone)
    ]
    assert not list(run.folder.rglob("*process_*")) and not list(run.folder.rglob("*.partial"))


def figures(run: Run) -> list[tuple[str, float]]:
    plan = run.load_plan()
    named = [(part.name, part.score) for part in (*plan.intervals, *plan.sites)]
    return named + [(variant.name, variant.damage) for variant in plan.variants]


def test_students_of_four_processes(tmp_path, planned, students):
    """A batch of six samples has two rows for two of them and one for the others."""
    run, arguments = planned()
    assert command(tmp_path, 4, *arguments, "--streamed").codes() == [0] * 4
    assert (
        farthest(run, students, "depth") < TOLERANCE
        and run.plan.read_bytes() == students.plan.read_bytes()
    )
    assert not any(run.states.iterdir())


def test_intervals_of_their_own_are_the_same_bits(tmp_path, write_run_file, alone):
    path, folders = write_run_file(tmp_path, "intervals"), ("probes", "depth", "width")
    text = (
        path.read_text()
        .split("[polish]")[0]
        .replace('device = "cpu"', 'device = "cpu"\nstreamed = true')
    )
    path.write_text(text)
    assert command(tmp_path, 2, "run", path).codes() == [0] * 2
    run = Run(tmp_path / "run")
    assert contents(run, *folders) == contents(alone, *folders)
    assert run.load_plan().sites == alone.load_plan().sites and not any(run.states.iterdir())


def test_processes_without_an_interval_wait(tmp_path, planned, students):
    run, arguments = planned()
    assert command(tmp_path, 4, *arguments, "--parallel", "intervals").codes() == [0] * 4
    assert contents(run, "depth") == contents(students, "depth")
    assert run.plan.read_bytes() == students.plan.read_bytes()


def started(run: Run, launch: Launched) -> Launched:
    """Waits until the first student is saved, so that they are in the midst of their updates."""
    while not list(run.students.glob("*.safetensors")):
        time.sleep(0.005)
    return launch


@pytest.mark.parametrize(
    "who", [[0, 1, 0, 1], [1]], ids=["all, twice, as launchers do", "one of them"]
)
def test_control_c_stops_all_at_one_step_and_another_number_goes_on(
    tmp_path, planned, students, who
):
    run, arguments = planned()
    launch = started(run, command(tmp_path, 2, *arguments))
    for rank in who:
        os.kill(launch.children[rank], signal.SIGINT)
    assert launch.codes() == [INTERRUPTED] * 2
    (line,) = launch.lines()
    assert "saved. Run the same command to go on" in line
    steps = sum(int(TensorFile(path).metadata["step"]) for path in run.students.iterdir())
    assert 0 < steps < 96
    assert command(tmp_path, 3, *arguments).codes() == [0] * 3
    assert farthest(run, students, "depth") < TOLERANCE
    assert run.plan.read_bytes() == students.plan.read_bytes()


@pytest.mark.parametrize("parallel", ["data", "intervals"])
def test_when_one_is_killed_the_other_ends_and_what_was_saved_stays(tmp_path, planned, parallel):
    run, arguments = planned()
    launch = started(run, command(tmp_path, 2, *arguments, "--parallel", parallel))
    os.kill(launch.children[1], signal.SIGKILL)
    assert launch.codes() == [USER_ERROR, -signal.SIGKILL]
    (line,) = launch.lines()
    assert "another process has ended" in line
    assert all(
        TensorFile(path).read("losses").isfinite().all()
        for path in run.students.glob("*.safetensors")
    )


def ordered(run: Run, arguments: list, **given) -> Path:
    """The same as a job does it."""
    names = (str(name).removeprefix("--").replace("-", "_") for name in arguments[5::2])
    settings = dict(zip(names, arguments[6::2], strict=True)) | {"model": arguments[2]}
    write_spec(run.folder, JobSpec(stages=(("distill-depth", settings),), **given))
    return run.folder


def test_a_job_of_two_processes_is_told_of_by_one(tmp_path, planned, students):
    run, arguments = planned()
    folder = ordered(run, arguments, parallel="intervals", preview_seconds=0.1)
    assert Launched(tmp_path, 2, lambda: worker([str(folder)])).codes() == [0, 0]
    assert contents(run, "depth") == contents(students, "depth")
    assert current_state(folder).status == "done"
    assert [event["kind"] for event in read_events(folder)].count("finished") == 1


def test_a_job_of_two_processes_is_cancelled_at_one_step(tmp_path, planned):
    run, arguments = planned()
    folder = ordered(run, [*arguments, "--rounds", 30], preview_seconds=0.1)
    launch = started(run, Launched(tmp_path, 2, lambda: worker([str(folder)])))
    ask_to_cancel(folder)
    assert launch.codes() == [INTERRUPTED] * 2
    assert current_state(folder).status == "cancelled" and "saved" in current_state(folder).error


def test_too_few_rows_are_said_once(tmp_path, planned):
    run, arguments = planned(samples=3)
    launch = command(tmp_path, 4, *arguments)
    assert launch.codes() == [USER_ERROR] * 4
    (line,) = launch.lines()
    assert "has a batch of 3 samples for 4 processes; calibrate with a larger --batch" in line
    assert command(tmp_path, 4, *arguments, "--parallel", "intervals").codes() == [0] * 4


def test_a_setting_that_does_not_exist_is_said_once(tmp_path, planned):
    _, arguments = planned()

    launch = command(tmp_path, 2, *arguments, "--roundz", 3)
    assert launch.codes() == [USER_ERROR] * 2
    assert ["--roundz" in output.read_text() for output in launch.outputs] == [True, False]


def test_a_loss_that_is_no_number_ends_all(tmp_path, planned, monkeypatch):
    run, arguments = planned()
    poison(monkeypatch, step=1)
    launch = command(tmp_path, 2, *arguments)
    assert launch.codes() == [USER_ERROR] * 2
    (line,) = launch.lines()
    assert "at step 1 of interval 0-1; nothing was saved" in line


def test_accelerates_cpu_option_is_refused_since_it_starts_one_process(
    monkeypatch, capsys, planned
):
    _, arguments = planned()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert main([str(a) for a in arguments]) == USER_ERROR
    assert "write --multi_gpu in place of --cpu" in capsys.readouterr().err
