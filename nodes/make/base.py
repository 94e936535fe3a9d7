"""What the nodes of jobs share: their last widgets, the run that they prepare and wait for, and their
outputs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from comfy_api.v0_0_2 import io, ui

from ...ppcl_engine.jobs.state import JobState, current_state
from ...ppcl_engine.settings.base_settings import Common, StatesConfig
from ...ppcl_engine.settings.presets import PRESETS, QUALITIES, preset
from ...ppcl_engine.system.wording import DEVICE_FORM, DEVICES
from ..node import Node
from ..widgets import WHOLE_SEED, help_of, inputs, values, with_advanced
from . import results
from .budgets import prepared
from .runs import RunType, model_of, progress_text
from .waiting import Start, finish_upstream, run_job, screen_of

# a combo's own output type is the list of its choices, which no combo input accepts
FileType = io.Custom("COMBO")
CATEGORY = "PPCL/make"
COMMON = ("device", "dtype", "streamed", "seed")
DEVICE = re.compile(DEVICE_FORM)
COMMON_FIRST = ("dtype", "streamed", "wait", "start", "preset")
AS_SET = "as set"
HOW = ("wait", "start", "keep_running", "preview_seconds")


def common_inputs(seed: bool, previews: bool, states: bool, kind: type) -> list[io.Input]:
    """The last widgets of every job. seed: whether results depend on one; previews: whether something
    is trained; states: whether states between blocks are measured or learned from; kind: the class
    of settings whose help texts are the tooltips."""
    devices = ["auto", "cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    picture = io.Int.Input(
        "preview_seconds",
        default=30,
        min=0,
        max=3600,
        tooltip="Seconds between pictures of how far it is (losses or errors; student and teacher); 0 draws none.",
    )
    return [
        io.Combo.Input("device", options=devices, default="auto", tooltip=help_of(kind, "device")),
        *inputs(kind, "dtype streamed seed" if seed else "dtype streamed", seed=WHOLE_SEED),
        io.Boolean.Input(
            "wait",
            default=True,
            tooltip="On: wait for the job and show it. Off: give the run at once.",
        ),
        io.Boolean.Input(
            "start",
            default=True,
            tooltip="Off: only write the run's folder; Prepare Run (PPCL) shows the command that does it elsewhere.",
        ),
        io.Boolean.Input(
            "keep_running", default=False, tooltip="The job goes on when ComfyUI is closed."
        ),
        *([picture] if previews else []),
        *(
            inputs(StatesConfig, "target_tokens_only", target_tokens_only={"optional": True})
            if states
            else []
        ),
    ]


def preset_input() -> io.Input:
    return io.Combo.Input(
        "preset",
        options=[AS_SET, *QUALITIES],
        default=AS_SET,
        optional=True,
        tooltip="How much work: as the widgets are set, or in place of those that count it: quick, good (a sixth of the "
        "paper's updates), paper. With start off the node says what each takes here.",
    )


def preset_of(stage: str, given: dict) -> dict:
    """The settings of the stage that the widget `preset` chooses in place of other widgets."""
    chosen = given.get("preset", AS_SET)
    return {} if chosen == AS_SET or stage not in PRESETS else preset(stage, chosen)


def outputs(*names: str) -> list[io.Output]:
    """A run, pictures of these names, and a text."""
    return [
        RunType.Output(display_name="run"),
        *(io.Image.Output(display_name=name) for name in names),
        io.String.Output(display_name="text"),
    ]


class JobNode(Node):
    """A node that does stages in a process of its own: it prepares a run, starts it, and waits."""

    PICTURES = ("preview",)
    """names of the outputs between the run and the text"""
    SHOWN: ClassVar[int] = 0
    """which of the pictures of a finished run the node itself shows"""
    FILES = {"run": model_of}
    LOOKED_UP = ("device",)
    FIRST: ClassVar[tuple[str, ...]] = ()
    """the settings that people change; the page may fold the others away"""

    @classmethod
    def schema(
        cls,
        name: str,
        display_name: str,
        description: str,
        settings: list[io.Input],
        more: tuple[io.Output, ...] = (),
        seed: bool = True,
        previews: bool = False,
        states: bool = False,
        last: tuple[io.Input, ...] = (),
        kind: type = Common,
        decided: tuple[str, ...] = (),
        presets: bool = False,
    ) -> io.Schema:
        """The node's schema. last: widgets added after the first release; they come last, since saved
        workflows hold values by position. decided: common settings that the node decides itself.
        presets: whether its stages have some."""
        common = [
            row for row in common_inputs(seed, previews, states, kind) if row.id not in decided
        ]
        rows = [*settings, *common, *last, *([preset_input()] if presets else [])]
        return io.Schema(
            node_id=f"PPCL_{name}",
            display_name=f"{display_name} (PPCL)",
            category=CATEGORY,
            description=description,
            inputs=with_advanced(rows, {*cls.FIRST, *COMMON_FIRST}),
            outputs=[*outputs(*cls.PICTURES), *more],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **given):
        """A node that does not wait for its run looks at it again every time."""
        waited_for = given.get("wait", True) and given.get("start", True)
        return super().fingerprint_inputs(**given) if waited_for else time.time()

    @classmethod
    def work(
        cls,
        kind: str,
        stages: list[tuple[type, str, dict]],
        upstream: str,
        given: dict,
        model: Path,
        **more: Callable[[Path], None],
    ) -> Path:
        """Prepares the run, and starts it and waits as the widgets say; returns its folder. stages:
        (settings class, name, settings beyond those that all share). more: `bring` and `check` of
        `run_job`."""
        check_device(given["device"])
        shared = {name: given[name] for name in COMMON if name in given} | {"model": str(model)}
        ready = [
            (name, values(kind_of, {**shared, **own, **preset_of(name, given)}))
            for kind_of, name, own in stages
        ]
        return run_job(kind, ready, upstream, how_of(given), screen_of(cls), **more)

    @classmethod
    def ready(cls, run: str, given: dict) -> Path:
        """Waits for the run before this one, if the widgets allow it. Returns its full model."""
        finish_upstream(run, how_of(given).wait, screen_of(cls))
        return model_of(run)

    @classmethod
    def output(cls, folder: Path, show: Callable[[Path], list]) -> io.NodeOutput:
        """The node's outputs. show(folder): those of a finished run, behind its name. Of a run that is
        not finished, every picture says how it stands."""
        state, number = current_state(folder), 0
        if state.status == "done":
            produced, number = show(folder), cls.SHOWN
        else:
            card, text = _standing(folder, state)
            produced = [*[card] * len(cls.PICTURES), text, *cls.nothing()]
        screen_of(cls).say(next(value for value in produced if isinstance(value, str)))
        pictures = [value for value in produced if isinstance(value, torch.Tensor)]
        shown = ui.PreviewImage(pictures[number], cls=cls) if pictures else None
        return io.NodeOutput(folder.name, *produced, ui=shown)

    @classmethod
    def nothing(cls) -> list:
        """What stands in place of the outputs behind the text while the run is not finished."""
        return []


def _standing(folder: Path, state: JobState) -> tuple[torch.Tensor, str]:
    """Picture and text of a job that is not finished; of one that was not started, what it would take."""
    if state.status == "queued" and state.pid is None:
        return prepared(folder)
    return results.state_picture(folder, state), progress_text(folder, state)


def check_device(name: str) -> None:
    """Raises ValueError for a text that does not name a device."""
    if not DEVICE.fullmatch(name):
        raise ValueError(f"{name[:50]!r} is not a device; choose {DEVICES}")


def how_of(given: dict) -> Start:
    return Start(**{name: given[name] for name in HOW if name in given})
