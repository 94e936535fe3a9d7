"""Jobs from ComfyUI, by POST /prompt, on the bundled teacher: a chain of them, and what can happen
to one."""

import copy
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import torch

from ppcl_engine.data.calibration import load_calibration
from ppcl_engine.jobs.spec import configs, read_spec
from ppcl_engine.jobs.state import current_state, read_events, read_state
from ppcl_engine.run import Run
from ppcl_engine.stages import run_stage
from ppcl_engine.system.tensor_files import TensorFile

from .conftest import eventually, listening
from .graphs import Graph, shipped

LONG = {"rounds": 16, "updates": 25, "learning_rate": 1e-3, "preview_seconds": 0}


@pytest.fixture(scope="module")
def planned(server, made, known, runs) -> str:
    """The name of a run whose plan is one short interval, at the beginning."""
    graph = Graph(known, 100)
    (detect,) = runs("detect")
    graph.add("PPCL_EditPlan", run=detect.name, intervals="0-1")
    success(server.run(graph.nodes))
    return runs("edit")[-1].name


def success(entry: dict) -> dict:
    assert entry["status"]["status_str"] == "success", error_of(entry)
    return entry["outputs"]


def error_of(entry: dict) -> str | None:
    """What the error box of the page shows."""
    found = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
    return found[0]["exception_message"] if found else None


def kinds_of(entry: dict) -> list[str]:
    return [kind for kind, _ in entry["status"]["messages"]]


def test_from_a_sampler_to_a_file_that_is_loaded(made, runs):
    outputs = success(made.entry)
    for kind in ("Probe", "Detect", "DistillDepth", "DistillWidth", "Export", "Compare"):
        assert made.outputs(f"PPCL_{kind}")["images"], kind
    export = runs("export")[0]  # the page has made another
    assert [path.name for path in (export / "exports").iterdir()] == ["my-demo.ppcl.safetensors"]
    assert load_calibration(Run(runs("record")[0]).calibration).samples == 16
    assert outputs


def test_every_job_says_how_far_it_is(made):
    """As a page hears it: a bar that moves, a line, and pictures while something is trained."""
    for kind in ("Probe", "Detect", "DistillDepth", "DistillWidth", "Export"):
        (number,) = made.numbers(f"PPCL_{kind}")
        steps = [value for node, value, most in made.heard.progress if node == number and most > 1]
        assert (
            max(steps, default=0) > 1
            and steps == sorted(steps)
            or kind in ("DistillWidth", "Export")
        ), kind
        lines = [line for node, line in made.heard.texts if node == number]
        assert any(" of " in line for line in lines) and any(
            line.endswith(": done") for line in lines
        ), kind
    (depth,) = made.numbers("PPCL_DistillDepth")
    assert depth in made.heard.previews
    assert any("loss " in line for node, line in made.heard.texts if node == depth)
    (record,) = made.numbers("PPCL_RecordCalibration")
    said = [line for node, line in made.heard.texts if node == record]
    assert said == ["16 of 16 samples are recorded; full: change seed to record others"]


def test_unchanged_inputs_do_not_run_again(server, made, runs):
    """Nothing of ComfyUI's own cache is left."""
    before = {path.name: len(read_events(path)) for path in runs()}
    server.post("/free", {"unload_models": True, "free_memory": True})
    success(server.run(made.prompt))
    assert {path.name: len(read_events(path)) for path in runs()} == before
    assert load_calibration(Run(runs("record")[0]).calibration).samples == 16


def test_a_variant_is_fine_tuned(server, made, known, runs):
    graph = Graph(known, 200)
    width = runs("width")[0]
    tuned = graph.add("PPCL_FineTune", run=width.name, steps=2, save_every=1, preview_seconds=0)
    text = graph.text([tuned, 2])
    said = success(server.run(graph.nodes))[text]["text"][0]
    assert "small_tuned: " in said and "velocity error" in said


class LongJob:
    """A training of some seconds, and what can happen to it. Every attempt is a folder."""

    def __init__(self, server, known: dict, planned: str):
        self.server, self.known = server, known
        self.graph = Graph(known, 300)
        self.number = self.graph.add("PPCL_DistillDepth", run=planned, **LONG)
        self.root = server.base / "output" / "ppcl"

    def node(self, **widgets) -> dict:
        self.graph.nodes[self.number]["inputs"] |= widgets
        return self.graph.nodes

    def attempts(self) -> list[Path]:
        folders = [
            path
            for path in self.root.glob("depth-*")
            if read_spec(path).stages[0][1]["rounds"] == LONG["rounds"]
        ]
        return sorted(folders, key=lambda path: path.stat().st_ctime_ns)

    def begun(self, number: int) -> Path:
        """The attempt of this number, when it is in the middle of its work."""
        found = eventually(lambda: self.attempts()[number - 1 : number], "there was no attempt")[0]
        eventually(
            lambda: (s := current_state(found)).status == "running" and s.step > 20,
            "it did not begin",
        )
        return found

    def left_watched_and_cancelled(self) -> None:
        success(self.server.run(self.node(wait=False)))
        assert not current_state(self.attempts()[0]).is_final
        folder = self.begun(1)
        (text,) = [
            row["text"][0]
            for row in success(self.server.run(shipped("ppcl-watch-and-cancel"))).values()
            if "text" in row
        ]
        assert text.startswith("distill-depth ") and " of 400" in text and "loss" in text
        cancel = Graph(self.known, 320)
        said = cancel.text([cancel.add("PPCL_CancelJob", run_name=folder.name), 0])
        assert (
            success(self.server.run(cancel.nodes))[said]["text"][0]
            == f"{folder.name}: asked to save and end"
        )
        eventually(lambda: current_state(folder).status == "cancelled", "it was not cancelled")

    def interrupted(self) -> None:
        """By the page's own Cancel."""
        with listening(self.server) as heard:
            prompt = self.server.queue(self.node(wait=True), heard.client)
            folder = self.begun(2)
            self.server.post("/interrupt", {})
            assert "execution_interrupted" in kinds_of(self.server.ended(prompt))
            assert current_state(folder).status == "cancelled" and workers_in(self.root) == []
            lines = [line for number, line in heard.texts if number == self.number]
        assert re.fullmatch(
            r"stopped at \d+ of 400 of distill-depth, all of it saved; press Run again to go on",
            lines[-1],
        )

    def killed(self) -> None:
        prompt = self.server.queue(self.node())
        folder = self.begun(3)
        os.kill(read_state(folder).pid, signal.SIGKILL)
        message = error_of(self.server.ended(prompt)).strip()
        assert (
            message.startswith(f"{folder.name} failed: the worker ended without a word (killed")
            and "\n" not in message
        )
        assert current_state(folder).status == "failed"

    def prepared_and_done_by_hand(self, elsewhere: Path) -> Path:
        graph = copy.deepcopy(self.graph)
        graph.nodes[self.number]["inputs"]["start"] = False
        said = graph.text([graph.add("PPCL_PrepareRun", run=[self.number, 0]), 1])
        command = (
            success(self.server.run(graph.nodes))[said]["text"][0]
            .splitlines()[0]
            .removeprefix("Here: ")
        )
        folder = self.attempts()[3]
        assert current_state(folder).status == "queued" and str(folder) in command
        subprocess.run(shlex.split(command), check=True, cwd=elsewhere, capture_output=True)
        success(self.server.run(self.node()))
        assert len(self.attempts()) == 4 and current_state(folder).status == "done"
        return folder


@pytest.mark.any_host
def test_whatever_happens_to_it_a_training_ends_in_the_same_bits(server, known, planned, tmp_path):
    job = LongJob(server, known, planned)
    job.left_watched_and_cancelled()
    job.interrupted()
    job.killed()
    folder = job.prepared_and_done_by_hand(tmp_path)
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(job.root / planned, undisturbed)
    for stage, config in configs(read_spec(folder), undisturbed):
        run_stage(stage, config)
    ends = [
        TensorFile(path / "depth" / "0-1.safetensors").read_all() for path in (folder, undisturbed)
    ]
    assert ends[0].keys() == ends[1].keys() and all(
        torch.equal(ends[0][name], ends[1][name]) for name in ends[0]
    )


def workers_in(root: Path) -> list[int]:
    """Processes that do jobs of the runs in this folder; not those of other servers."""
    return [
        p.pid
        for p in psutil.process_iter(["cmdline"])
        if any(w.startswith(f"{root}/") for w in p.info["cmdline"] or [])
    ]
