"""run.json: what a job has to do. Written once; nodes write it, a worker on any machine reads
it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from ..settings.base_settings import Common, SharedConfig, TuningConfig, from_mapping
from ..settings.convert_settings import SparsifyConfig
from ..settings.ranges import Range, Settings
from ..stages import STAGES
from ..system.atomic import read_json, write_json

ORDER = "run.json"
VERSION = 1
ALLOWED = (
    "calibrate",
    "probe",
    "detect",
    "distill-depth",
    "detect-width",
    "distill-width",
    "polish",
    "variants",
    "finetune",
    "export",
    "sparsify",
    "evaluate",
)
OURS = ("run", "dry_run")  # settings that a job sets by itself


@dataclass(frozen=True, kw_only=True)
class Order(Settings):
    """stages: (name, settings) in their order, a stage may come again. parallel: how several
    processes share the training. outlive: go on when the process that launched the worker ends.
    preview_seconds: between pictures; 0 draws none. upstream: the run that its files come from.
    identity: hash of all that its results hang on."""

    stages: tuple[tuple[str, dict], ...]
    parallel: Literal["data", "intervals"] = "data"
    outlive: bool = False
    preview_seconds: Annotated[float, Range(0.0, 3600.0)] = 30.0
    upstream: str = ""
    identity: str = ""


def write_order(folder: Path, order: Order) -> None:
    """Paths in the settings become text."""
    stages = [
        [stage, {n: str(v) if isinstance(v, Path) else v for n, v in s.items()}]
        for stage, s in order.stages
    ]
    write_json(Path(folder) / ORDER, {"version": VERSION, **asdict(order), "stages": stages})


def read_order(folder: Path) -> Order:
    """Raises ValueError, in one line, for a missing file, rubbish, an unknown field and a stage
    that jobs do not run."""
    path = Path(folder) / ORDER
    if not path.is_file():
        raise ValueError(
            f"{Path(folder)} is not a job folder: it has no {ORDER}; choose one from output/ppcl"
        )
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} is not a job's order: it holds no JSON object; prepare the run again"
        )
    if values.pop("version", None) != VERSION:
        raise ValueError(
            f"{path} is of another version than {VERSION}; prepare the run again, or update ComfyUI-PPCL"
        )
    stages = _stages(values.pop("stages", None), path)
    return Order(**{**vars(from_mapping(_Rest, values, str(path))), "stages": stages})


def configs(order: Order, folder: Path, model: Path | None = None) -> list[tuple[str, Common]]:
    """Every stage with its settings, checked. Paths are relative to the folder, so that it can be
    moved; `model` takes the place of the order's. Raises ValueError naming stage and setting."""
    folder = Path(folder).absolute()
    return [
        (stage, _config(stage, settings, folder, model, order.parallel))
        for stage, settings in order.stages
    ]


def _sharing(kind: type, parallel: str) -> dict:
    """Polish and fine-tuning learn from one loss: their processes share rows, whatever the order
    says."""
    return (
        {"parallel": parallel}
        if issubclass(kind, SharedConfig) and not issubclass(kind, TuningConfig)
        else {}
    )


@dataclass(frozen=True, kw_only=True)
class _Rest(Order):
    """What is read field by field."""

    stages: tuple[tuple[str, dict], ...] = ()


def _model_setting(kind: type, chosen: dict) -> str:
    """Which one names the full model: sparsify prunes it itself, or has it as the base of a
    bundle."""
    if kind is not SparsifyConfig:
        return "model"
    return "base" if chosen.get("base") else "path"


def _stages(rows, path: Path) -> tuple[tuple[str, dict], ...]:
    match rows:
        case [*_] if all(isinstance(row, list) and len(row) == 2 for row in rows):
            if all(
                isinstance(stage, str) and isinstance(settings, dict) for stage, settings in rows
            ):
                for stage, _ in rows:
                    _check_stage(stage, path)
                return tuple((stage, settings) for stage, settings in rows)
    raise ValueError(f"{path}: stages are a list of [name, settings]")


def _check_stage(stage: str, where: object) -> None:
    if stage not in ALLOWED:
        raise ValueError(f"{where}: unknown stage {stage!r}; a job can do: {', '.join(ALLOWED)}")


def _config(stage: str, settings: dict, folder: Path, model: Path | None, parallel: str) -> Common:
    where = f"stage {stage}"
    _check_stage(stage, folder / ORDER)
    taken = [name for name in OURS if name in settings]
    if taken:
        raise ValueError(f"{where}: {taken[0]!r} is not a job's to choose; leave it out")
    texts = {
        name: str(value) if isinstance(value, Path) else value for name, value in settings.items()
    }
    kind = STAGES[stage][0]
    chosen = {**_sharing(kind, parallel), **texts, "run": str(folder)}
    chosen |= {_model_setting(kind, chosen): str(Path(model).absolute())} if model else {}
    config = from_mapping(kind, chosen, where)
    paths = {
        f.name: folder / getattr(config, f.name)
        for f in fields(config)
        if isinstance(getattr(config, f.name), Path)
    }
    return replace(config, **paths)
