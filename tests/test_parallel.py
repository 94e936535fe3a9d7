"""Several processes: what one process gives, within float tolerance (rows shared) or to the bit (intervals shared)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ppcl_engine
from ppcl_engine.__main__ import INTERRUPTED, USER_ERROR, main
from ppcl_engine.checkpoint import Weights
from ppcl_engine.config import FinetuneConfig, PolishConfig
from ppcl_engine.files import TensorFile, write_tensors
from ppcl_engine.jobs.order import Order, write_order
from ppcl_engine.jobs.state import ask_to_cancel, current_state, read_events
from ppcl_engine.jobs.work import main as worker
from ppcl_engine.losses import LOSSES
from ppcl_engine.parallel import Processes, joined, processes
from ppcl_engine.plan import PruningPlan, parse_intervals
from ppcl_engine.run import Run
from ppcl_engine.training import Trainer

from .launched import Launched, command, free_port

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
        text = RUN_FILE.format(model=teacher_file, run=folder / "run", parallel=f'parallel = "{parallel}"')
        (folder / "run.toml").write_text(text)
        return folder / "run.toml"

    return write


@pytest.fixture(scope="module")
def alone(tmp_path_factory, write_run_file) -> Run:
    """The whole method in one process."""
    path = write_run_file(tmp_path_factory.mktemp("alone"))
    assert main(["run", "--file", str(path)]) == 0
    return Run(path.parent / "run")


@pytest.fixture(scope="module")
def planned(tmp_path_factory, architecture, teacher_file, make_run, calibration_of):
    """A run folder with a plan, no detection needed, and the command that trains its students."""

    def make(samples: int = 6) -> tuple[Run, list]:
        calibration = calibration_of(teacher_file, samples=samples)
        run, weights = Run(make_run(tmp_path_factory.mktemp("run"), teacher_file, calibration)), Weights(teacher_file)
        plan = PruningPlan(
            architecture=architecture.name,
            config=weights.config,
            num_blocks=weights.num_blocks,
            fingerprint=weights.fingerprint,
            intervals=parse_intervals("0-1 2-4"),
        )
        run.plan.write_text(plan.to_json())
        options = ["--rounds", 3, "--updates", 16, "--warm-up", 2, "--learning-rate", 1e-3, "--device", "cpu"]
        return run, ["distill-depth", "--model", teacher_file, "--run", run.folder, *options]

    return make


@pytest.fixture(scope="module")
def students(planned) -> Run:
    """What one process trains."""
    run, arguments = planned()
    assert main([str(a) for a in arguments]) == 0
    return run


def farthest(run: Run, other: Run, *folders: str) -> float:
    """Largest relative difference of a tensor in the files of these folders. They hold the same tensors."""
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


@torch.no_grad()
def relative(tensor: torch.Tensor, expected: torch.Tensor) -> float:
    return float((tensor - expected).norm() / expected.norm().clamp_min(1e-12))


def contents(run: Run, *folders: str) -> dict[str, bytes]:
    files = [path for folder in folders for path in (run.folder / folder).rglob("*.safetensors")]
    return {str(path.relative_to(run.folder)): path.read_bytes() for path in files}


@settings(max_examples=30, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 11), min_size=1, max_size=3), seed=st.integers(0, 99), name=st.sampled_from([*LOSSES])
)
def test_the_losses_of_the_parts_add_up_to_the_whole(cuts, seed, name):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(12, 5, generator=generator) for _ in range(2))
    sizes: list[torch.Tensor] = []
    expected = LOSSES[name](student, teacher, lambda size: sizes.append(size) or size)
    pieces, parts = [rows.tensor_split(sorted(cuts)) for rows in (student, teacher)], []
    for s, t in zip(*pieces, strict=True):
        whole = iter(sizes)
        parts.append(LOSSES[name](s, t, lambda size, whole=whole: next(whole)))
    assert float(sum(parts)) == pytest.approx(float(expected), rel=1e-5)
    assert float(LOSSES[name](student, teacher)) == float(expected)


def trained(loss: str) -> Trainer:
    """Three updates of a small model on rows of a batch."""
    torch.manual_seed(0)
    trainer = Trainer(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)), 0.1)
    for _ in range(3):
        rows = processes().rows({"x": torch.randn(10, 6), "y": torch.randn(10, 4)})
        value = LOSSES[loss](trainer.module(rows["x"]), rows["y"], processes().sum)
        trainer.update(value, 1e-2, "here")
    return trainer


@pytest.mark.parametrize("count", [2, 4])
def test_gradients_add_up_and_all_processes_keep_the_same_bits(tmp_path, count):
    def work() -> int:
        with joined("data", "cpu") as current:
            for loss in LOSSES:
                trainer = trained(loss)
                gradients = {f"gradient.{n}": p.grad for n, p in trainer.module.named_parameters()}
                write_tensors(tmp_path / f"{loss}_{current.rank}", {**trainer.tensors(), **gradients})
            current.wait()
        return 0

    assert Launched(tmp_path, count, work).codes() == [0] * count
    for loss in LOSSES:
        replicas = [TensorFile(tmp_path / f"{loss}_{rank}").read_all() for rank in range(count)]
        assert all(torch.equal(r[name], tensor) for r in replicas for name, tensor in replicas[0].items())
        trainer = trained(loss)
        for name, parameter in trainer.module.named_parameters():
            assert relative(replicas[0][f"gradient.{name}"], parameter.grad) < 1e-6
            assert relative(replicas[0][f"weight.{name}"], parameter) < 1e-6
        torch.testing.assert_close(replicas[0]["losses"], torch.tensor(trainer.losses), rtol=1e-6, atol=0)


def test_the_whole_method_under_accelerate_launch(tmp_path, write_run_file, alone):
    """Rows shared by two processes; detect and detect-width are the main one's, while the other waits."""
    path = write_run_file(tmp_path)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--main_process_port", str(free_port()), "-m", "ppcl_engine", "run", "--file", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launcher, cwd=Path(ppcl_engine.__file__).parents[1], env=environment, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "probe", "detect", "distill-depth", "detect-width", "distill-width", "polish", "finetune"]  # fmt: skip
    run = Run(tmp_path / "run")
    assert farthest(run, alone, "probes", "depth", "width", "polished", "tuned") < TOLERANCE
    assert figures(run) == [(name, pytest.approx(score, rel=TOLERANCE)) for name, score in figures(alone)]
    assert not list(run.folder.rglob("*process_*")) and not list(run.folder.rglob("*.partial"))


def figures(run: Run) -> list[tuple[str, float]]:
    plan = run.load_plan()
    named = [(part.name, part.score) for part in (*plan.intervals, *plan.sites)]
    return named + [(variant.name, variant.damage) for variant in plan.variants]


def test_students_of_four_processes(tmp_path, planned, students):
    """A batch of six samples has two rows for two of them and one for the others."""
    run, arguments = planned()
    assert command(tmp_path, 4, *arguments, "--streamed").codes() == [0] * 4
    assert farthest(run, students, "depth") < TOLERANCE and run.plan.read_bytes() == students.plan.read_bytes()
    assert not any(run.states.iterdir())


def test_intervals_of_their_own_are_the_same_bits(tmp_path, write_run_file, alone):
    path, folders = write_run_file(tmp_path, "intervals"), ("probes", "depth", "width")
    text = path.read_text().split("[polish]")[0].replace('device = "cpu"', 'device = "cpu"\nstreamed = true')
    path.write_text(text)
    assert command(tmp_path, 2, "run", "--file", path).codes() == [0] * 2
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


@pytest.mark.parametrize("who", [[0, 1, 0, 1], [1]], ids=["all, twice, as launchers do", "one of them"])
def test_control_c_stops_all_at_one_step_and_another_number_goes_on(tmp_path, planned, students, who):
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
    assert all(TensorFile(path).read("losses").isfinite().all() for path in run.students.glob("*.safetensors"))


def ordered(run: Run, arguments: list, **order) -> Path:
    """The same as a job's order."""
    names = (str(name).removeprefix("--").replace("-", "_") for name in arguments[5::2])
    settings = dict(zip(names, arguments[6::2], strict=True)) | {"model": arguments[2]}
    write_order(run.folder, Order(stages=(("distill-depth", settings),), **order))
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

    def work() -> int:
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in [*arguments, "--roundz", 3]])
        return end.value.code

    launch = Launched(tmp_path, 2, work)
    assert launch.codes() == [USER_ERROR] * 2
    assert ["--roundz" in output.read_text() for output in launch.outputs] == [True, False]


def test_a_loss_that_is_no_number_ends_all(tmp_path, planned):
    run, arguments = planned()
    launch = command(tmp_path, 2, *arguments, "--learning-rate", "1e30", "--warm-up", 0)
    assert launch.codes() == [USER_ERROR] * 2
    (line,) = launch.lines()
    assert "at step 1 of interval 0-1; the last good state is kept" in line


@pytest.mark.parametrize("kind", [PolishConfig, FinetuneConfig])
def test_what_learns_from_one_loss_cannot_be_split_by_intervals(kind, tmp_path):
    with pytest.raises(ValueError, match="--parallel intervals: here all parts learn from one loss"):
        kind(model=tmp_path, run=tmp_path, parallel="intervals")


def test_accelerates_cpu_option_is_refused_since_it_starts_one_process(monkeypatch, capsys, planned):
    _, arguments = planned()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert main([str(a) for a in arguments]) == USER_ERROR
    assert "write --multi_gpu in the place of --cpu" in capsys.readouterr().err


def test_one_process_shares_nothing():
    tensor, parameter = torch.ones(3, requires_grad=True), nn.Parameter(torch.ones(2))
    for share in ("", "data", "intervals"):
        current = Processes(share=share)
        assert current.sum(tensor) is tensor and current.own([1, 2]) == [1, 2] and current.any(True) is True
        assert current.folder(Path("x")) == Path("x") and current.is_main and current.writes
        rows = {"grid": torch.ones(1, 3), "timestep": torch.ones(1)}
        assert current.rows(rows) is rows
        current.sum_gradients([parameter], tensor.sum())
        current.wait()
    assert parameter.grad is None and processes() == Processes()
