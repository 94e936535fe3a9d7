"""run.json: the stages of a job and their settings. Nodes write it once; a worker on any machine reads
it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from ..settings.base_settings import SharedConfig, TuningConfig, from_mapping
from ..settings.convert_settings import JobConfig, SparsifyConfig
from ..settings.ranges import Range, Settings
from ..stages import STAGES
from ..system.atomic import read_json, write_json

SPEC_FILE = "run.json"
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
    "adapt-lora",
    "sparsify",
    "evaluate",
)
SET_BY_THE_JOB = ("run", "dry_run")


@dataclass(frozen=True, kw_only=True)
class JobSpec(Settings):
    """What a job has to do."""

    stages: tuple[tuple[str, dict], ...]
    """(name, settings) of each stage, in order; a stage may occur more than once"""
    parallel: Literal["data", "intervals"] = "data"
    """how several processes share the training"""
    outlive: bool = False
    """whether the job goes on after the process that launched its worker has ended"""
    preview_seconds: Annotated[float, Range(0.0, 3600.0)] = 30.0
    """seconds between two previews; 0 draws none"""
    upstream: str = ""
    """name of the run whose files it starts from; "": none"""
    identity: str = ""
    """hash of everything that decides the results"""


def write_spec(folder: Path, spec: JobSpec) -> None:
    """Writes run.json; paths in the settings become text."""
    stages = [
        [stage, {n: str(v) if isinstance(v, Path) else v for n, v in s.items()}]
        for stage, s in spec.stages
    ]
    write_json(Path(folder) / SPEC_FILE, {"version": VERSION, **asdict(spec), "stages": stages})


def read_spec(folder: Path) -> JobSpec:
    """Reads run.json. Raises ValueError, in one line, if it is missing or malformed, has an unknown
    field, or names a stage that jobs do not run."""
    path = Path(folder) / SPEC_FILE
    if not path.is_file():
        raise ValueError(
            f"{Path(folder)} is not a job folder: it has no {SPEC_FILE}; choose one from output/ppcl"
        )
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} does not describe a job: it is not a JSON object; prepare the run again"
        )
    if values.pop("version", None) != VERSION:
        raise ValueError(
            f"{path} is not of format version {VERSION}; prepare the run again, or update ComfyUI-PPCL"
        )
    stages = _stages(values.pop("stages", None), path)
    return JobSpec(**{**vars(from_mapping(_Rest, values, str(path))), "stages": stages})


def configs(spec: JobSpec, folder: Path, model: Path | None = None) -> list[tuple[str, JobConfig]]:
    """Every stage with its checked settings.

    Paths in the spec are relative to the folder, so that it can be moved; `model` replaces the model
    that the spec names. Raises ValueError naming stage and setting.
    """
    folder = Path(folder).absolute()
    return [
        (stage, _config(stage, settings, folder, model, spec.parallel))
        for stage, settings in spec.stages
    ]


def _sharing(kind: type, parallel: str) -> dict:
    """The `parallel` setting of a stage that several processes share. Polish and fine-tuning have one
    loss, so their processes shard it whatever the spec says."""
    return (
        {"parallel": parallel}
        if issubclass(kind, SharedConfig) and not issubclass(kind, TuningConfig)
        else {}
    )


@dataclass(frozen=True, kw_only=True)
class _Rest(JobSpec):
    """The fields of a JobSpec other than its stages."""

    stages: tuple[tuple[str, dict], ...] = ()


def _model_setting(kind: type, chosen: dict) -> str:
    """The name of the setting that holds the full model. For sparsify that is `base` if it prunes a
    bundle, and `path` otherwise."""
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
    raise ValueError(f"{path}: stages is not a list of [name, settings]; prepare the run again")


def _check_stage(stage: str, where: object) -> None:
    if stage not in ALLOWED:
        raise ValueError(f"{where}: unknown stage {stage!r}; a job can do: {', '.join(ALLOWED)}")


def _config(
    stage: str, settings: dict, folder: Path, model: Path | None, parallel: str
) -> JobConfig:
    where = f"stage {stage}"
    _check_stage(stage, folder / SPEC_FILE)
    refused = [name for name in SET_BY_THE_JOB if name in settings]
    if refused:
        raise ValueError(f"{where}: a job sets {refused[0]!r} itself; leave it out")
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
