"""PPCL_WatchJob, PPCL_CancelJob, PPCL_PrepareRun: look at a job, stop one, or run one by hand on another
machine."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from comfy_api.v0_0_2 import io, ui

from ...ppcl_engine.jobs.launch import prepared_command
from ...ppcl_engine.jobs.spec import JobSpec, read_spec, write_spec
from ...ppcl_engine.jobs.state import ask_to_cancel, current_state
from ..node import Node
from ..paths import run_names, runs
from ..widgets import inputs
from . import results
from .base import CATEGORY, outputs
from .runs import RunType, folder_of, model_of, progress_text, run_input
from .waiting import failure_text, follow, leave_memory, screen_of

NEWEST = "newest"
MOST_PROCESSES = 64


def chosen(run_name: str, run: str | None) -> str:
    """Name of the chosen run: a connected run is used instead of the name, and NEWEST is the one at
    work, else the last. Raises ValueError if there is no run yet."""
    if run is not None:
        return run
    if run_name != NEWEST:
        return run_name
    names = runs().names()
    if not names:
        raise ValueError("there is no run yet; start a job first")
    return next((name for name, state in names if not state.is_final), names[0][0])


def choice() -> list[io.Input]:
    return [
        io.Combo.Input(
            "run_name",
            options=[NEWEST, *run_names()],
            tooltip="A run in output/ppcl. newest: the one at work, else the last. Press R for those made since.",
        ),
        run_input(optional=True, tooltip="A run of another PPCL node, in the place of the name."),
    ]


class WatchJob(Node):
    LOOKED_UP = ("run_name",)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PPCL_WatchJob",
            display_name="Watch Job (PPCL)",
            category=CATEGORY,
            description="How a job stands: one look, or until it ends. It may have been started before ComfyUI was.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                *choice(),
                io.Boolean.Input(
                    "wait",
                    default=True,
                    tooltip="On: watch until the job ends; Cancel ends the watching, not the job. Off: one look.",
                ),
            ],
            outputs=outputs("preview"),
        )

    @classmethod
    def fingerprint_inputs(cls, **given):
        return time.time()

    @classmethod
    def perform(cls, run_name, wait, run=None) -> io.NodeOutput:
        folder, screen = folder_of(chosen(run_name, run)), screen_of(cls)
        state = current_state(folder)
        if wait and not state.is_final and state.pid is not None:
            leave_memory()
            state = follow(folder, screen)
        text = (
            failure_text(folder, state)
            if state.status == "failed"
            else progress_text(folder, state)
        )
        picture = results.state_picture(folder, state)
        screen.say(text)
        return io.NodeOutput(folder.name, picture, text, ui=ui.PreviewImage(picture, cls=cls))


class CancelJob(Node):
    LOOKED_UP = ("run_name",)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PPCL_CancelJob",
            display_name="Cancel Job (PPCL)",
            category=CATEGORY,
            description="Asks a job to save and end. The node that made it goes on from there when it runs again.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=choice(),
            outputs=[io.String.Output(display_name="text")],
        )

    @classmethod
    def fingerprint_inputs(cls, **given):
        return time.time()

    @classmethod
    def perform(cls, run_name, run=None) -> io.NodeOutput:
        folder = folder_of(chosen(run_name, run))
        before = current_state(folder)
        ask_to_cancel(folder)
        text = (
            progress_text(folder, before)
            if before.is_final
            else f"{folder.name}: asked to save and end"
        )
        screen_of(cls).say(text)
        return io.NodeOutput(text)


class PrepareRun(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PPCL_PrepareRun",
            display_name="Prepare Run (PPCL)",
            category=CATEGORY,
            description="The command that does a run in a terminal, here or on another machine, on one device or several.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                run_input(tooltip="A run of a job node whose start is off."),
                io.Int.Input(
                    "processes",
                    default=1,
                    min=1,
                    max=MOST_PROCESSES,
                    tooltip="Devices of that machine to use.",
                ),
                *inputs(
                    JobSpec,
                    "parallel",
                    parallel={
                        "tooltip": "How several processes share the training: "
                        "data (each takes other samples), intervals (each takes other students)."
                    },
                ),
            ],
            outputs=[RunType.Output(display_name="run"), io.String.Output(display_name="text")],
        )

    @classmethod
    def fingerprint_inputs(cls, **given):
        return time.time()

    @classmethod
    def perform(cls, run, processes, parallel) -> io.NodeOutput:
        text = how_to_start(run, processes, parallel)
        screen_of(cls).say(text)
        return io.NodeOutput(run, text)


def how_to_start(run: str, processes: int, parallel: str) -> str:
    """Writes `parallel` into a job that has not been started; returns what to do with it. Raises
    ValueError for a run that has been started."""
    folder = folder_of(run)
    state = current_state(folder)
    if state.status != "queued" or state.pid is not None:
        raise ValueError(
            f"{run} {state.in_words}, so it cannot be started by hand; turn start off in the node that makes it"
        )
    spec = read_spec(folder)
    write_spec(folder, replace(spec, parallel=parallel))
    return "\n".join(_instructions(folder, processes, model_of(run)))


def _instructions(folder: Path, processes: int, model: Path) -> list[str]:
    return [
        f"Here: {prepared_command(folder, processes)}",
        f"Elsewhere: copy the folder output/ppcl/{folder.name} and {model.name}, and add --model and where that is.",
        "When it is done, and the folder is back in its place, press Run again.",
    ]
