"""Runs as nodes see them: a name in ComfyUI's output folder, the model it is about, and its state in
words."""

from __future__ import annotations

from pathlib import Path

from comfy_api.v0_0_2 import io

from ...ppcl_engine.jobs.spec import read_spec
from ...ppcl_engine.jobs.state import METRICS, JobState
from ...ppcl_engine.run import Run
from ...ppcl_engine.settings.prune_settings import VariantsConfig
from ...ppcl_engine.system.atomic import read_json
from ...ppcl_engine.system.numbers import duration_text, speed_text
from ..paths import known_model, runs

RunType = io.Custom("PPCL_RUN")
RECORDING = "recording.json"  # in a recorded run: its model and limits
TAIL = 300  # bytes at the end of a file that contain its last line
TRAINING = {"distill-depth", "distill-width", "polish", "finetune", "adapt-lora"}
LONGEST_ERROR = 500  # characters: a state file may come from anywhere


def run_input(
    name: str = "run", optional: bool = False, tooltip: str = "A run of another PPCL node."
) -> io.Input:
    return RunType.Input(name, optional=optional, tooltip=tooltip)


def folder_of(name: str) -> Path:
    """The folder of a run. Raises ValueError for a name that no run has."""
    if not isinstance(name, str):
        raise ValueError("run is the output of another PPCL node; connect it")
    return runs().path(name)


def model_of(name: str) -> Path:
    """The full model that a run is about: named in its own job file, in its recording, or by the run
    before it. Raises ValueError if none of them names it, or if the host no longer lists the
    file."""
    first, seen = name, set()
    while name not in seen:
        seen.add(name)
        folder = folder_of(name)
        if (folder / RECORDING).is_file():
            return known_model(_recorded_model(folder / RECORDING), name)
        spec = read_spec(folder)
        named = [settings["model"] for _, settings in spec.stages if "model" in settings]
        if named:
            return known_model(Path(str(named[-1])), name)
        name = spec.upstream or name
    raise ValueError(f"run {first} does not say which model it was made from; make it again")


def measured(run: str) -> list[tuple[type, str, dict]]:
    """The stage that measures the variants, unless an earlier run has done so."""
    plan = Run(folder_of(run)).load_plan()
    if any(not variant.tuned for variant in plan.variants):
        return []
    return [(VariantsConfig, "variants", {})]


def _recorded_model(recording: Path) -> Path:
    match read_json(recording):
        case {"model": str(model)}:
            return Path(model)
    raise ValueError(
        f"{recording} does not say which model was recorded; delete the folder, and record again"
    )


def check_recorded(name: str) -> None:
    """Raises ValueError for a recording that has not been drawn yet."""
    folder = folder_of(name)
    if (folder / RECORDING).is_file() and not Run(folder).calibration.is_file():
        raise ValueError(
            f"nothing is recorded in {name} yet; draw with the MODEL of Record Calibration (PPCL) and connect the "
            "sampler's LATENT to after"
        )


def progress_text(folder: Path, state: JobState) -> str:
    """ "distill-depth 120 of 1,400, 3.1/s, 6 min left, loss 0.043" """
    if state.is_final:
        return f"{folder.name}: {state.status}" + (
            f" ({one_line(state.error)})" if state.error else ""
        )
    if not state.steps:
        return f"{folder.name}: {state.stage or state.status}{_place(state)}"
    parts = [f"{state.what or state.stage} {state.step:,} of {state.steps:,}{_place(state)}"]
    parts += [speed_text(state.rate)] if state.rate else []
    parts += [f"{duration_text(state.seconds_left)} left"] if state.seconds_left is not None else []
    loss = last_loss(folder) if state.stage in TRAINING else None
    return ", ".join(parts if loss is None else [*parts, f"loss {loss:.2g}"])


def one_line(text: str) -> str:
    return " ".join(text.split())[:LONGEST_ERROR]


def _place(state: JobState) -> str:
    return f" (stage {state.number} of {state.stages})" if state.stages > 1 and state.number else ""


def last_line(path: Path) -> str:
    """The last line of a text file; "" if there is none."""
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = file.read().decode("utf-8", "replace").rstrip("\n").split("\n")
    return lines[-1]


def last_loss(folder: Path) -> float | None:
    """The loss of the update that was written last; None before the first."""
    *_, value = last_line(folder / METRICS).split(",")
    try:
        return float(value)
    except ValueError:  # no update yet
        return None
