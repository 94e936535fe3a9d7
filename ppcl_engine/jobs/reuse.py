"""What a new run takes over from an earlier one, as hard links, or as copies where links are
impossible."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from ..system.run_lock import HOLDER, LOCK
from .spec import SPEC_FILE, JobSpec, configs
from .state import CANCEL, EVENTS, LOG, PREVIEW, STATE

CALIBRATION = "calibration.safetensors"
PRODUCTS = (
    CALIBRATION,
    "probes",
    "curves.safetensors",
    "detect.json",
    "plan.json",
    "depth",
    "width.json",
    "alignment.safetensors",
    "width",
    "polished",
    "tuned",
)
"""the files and folders that stages leave for later stages"""
CHECKED = ("probes", "curves.safetensors", "bits")
"""products that hold their settings: a stage uses them only if these are its own"""
# scratch files of all stages; only those of calibrate are used again after an interruption
SCRATCH, RESUMED = "states", "calibrate"
OF_ONE_JOB = {SPEC_FILE, STATE, EVENTS, CANCEL, LOCK, HOLDER, LOG, PREVIEW}
COPIED = {".json", ".jsonl", ".csv", ".txt", ".html"}
NOT_THE_STUDENTS = {"model", "run", "device", "streamed", "dry_run", "intervals", "parallel"}
"""settings of distill-depth that change no student"""


def seed_from_upstream(
    upstream: Path, folder: Path, spec: JobSpec, depth_made_with: dict | None
) -> None:
    """Takes over all products of the upstream except those that the job's stages will replace.
    `depth_made_with`: distill-depth's settings for the upstream's students; None if it has none."""
    replaced = _replaced(spec, depth_made_with)
    for name in PRODUCTS:
        if name not in replaced:
            take(upstream / name, folder / name)


def seed_attempt(earlier: Path, folder: Path) -> None:
    """Takes over everything that an earlier attempt at the same job left, except the files about that
    attempt itself."""
    for path in sorted(earlier.iterdir()):
        if path.name not in OF_ONE_JOB | {SCRATCH} and not path.name.startswith("."):
            take(path, folder / path.name)
    take(earlier / SCRATCH / RESUMED, folder / SCRATCH / RESUMED)


def seed_from_sibling(sibling: Path, folder: Path, spec: JobSpec, its_spec: JobSpec) -> None:
    """Takes over what the stages can still use of a run of the same kind with other settings, as far
    as the folder does not have it yet: probes, detection's curves, and students trained alike.

    Without it, another `remove`, `method` or `protect` would measure the curves again, and train again
    the students of intervals that both plans have. On the bundled teacher (two CPU cores; remove 6,
    then 8) detection took 0.7 s instead of 130 s, and two rounds of distillation, four of whose six
    students were there, 17 s instead of 51 s. For Qwen-Image `needs` estimates 2.3 hours of detection
    on a GPU of 400 TFLOP/s. To measure detection: `ppcl detect --model M --run R --remove 8` in a run
    that was detected with another `--remove`, with curves.safetensors there and without.
    """
    if _models(spec) != _models(its_spec):
        return
    for name in CHECKED:
        if not (folder / name).exists():
            take(sibling / name, folder / name)
    if not (folder / "depth").exists() and _same_students(sibling, folder, spec, its_spec):
        take(sibling / "depth", folder / "depth")


def take(source: Path, target: Path) -> None:
    """Links a file, or all files of a folder, to the target; leaves out symbolic links and unfinished
    files."""
    if source.is_symlink() or not source.exists() or source.name.startswith("."):
        return
    if source.is_dir():
        for path in sorted(source.iterdir()):
            take(path, target / path.name)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix in COPIED:
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(source, target)


def clear_scratch(folder: Path, keep: str = "") -> None:
    """Deletes the states between blocks, gigabytes that a killed stage leaves behind."""
    scratch = folder / SCRATCH
    for path in scratch.iterdir() if scratch.is_dir() else ():
        if path.name != keep:
            shutil.rmtree(path, ignore_errors=True)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _replaced(spec: JobSpec, depth_made_with: dict | None) -> set[str]:
    """The products that the job's stages make again rather than take from the upstream."""
    stages, replaced = dict(spec.stages), set()
    settings = [s for s in (stages.get("distill-depth"), depth_made_with) if s is not None]
    if len(settings) == 2 and _student_settings(settings[0]) != _student_settings(settings[1]):
        replaced |= {"depth", "width", "polished"}
    if {"detect-width", "distill-width"} & set(stages):
        replaced |= {"width", "polished"}
    return replaced | ({"polished"} if "polish" in stages else set())


def _student_settings(settings: dict) -> dict:
    """All settings of distill-depth that change its students, with defaults filled in."""
    spec = JobSpec(stages=(("distill-depth", settings),))
    config = configs(spec, Path())[0][1]
    return {name: value for name, value in vars(config).items() if name not in NOT_THE_STUDENTS}


def _same_students(sibling: Path, folder: Path, spec: JobSpec, its_spec: JobSpec) -> bool:
    """Whether both jobs train students with the same settings on the same calibration set."""
    ours, theirs = (dict(s.stages).get("distill-depth") for s in (spec, its_spec))
    if ours is None or theirs is None or _student_settings(ours) != _student_settings(theirs):
        return False
    calibrations = [dict(s.stages).get("calibrate") for s in (spec, its_spec)]
    if any(calibrations):
        return calibrations[0] == calibrations[1] and spec.upstream == its_spec.upstream
    files = [path / CALIBRATION for path in (folder, sibling)]
    return all(f.is_file() for f in files) and sha256_of(files[0]) == sha256_of(files[1])


def _models(spec: JobSpec) -> set[str]:
    """The full models that a job's stages work on."""
    return {
        str(settings.get("model", settings.get("base") or settings.get("path")))
        for _, settings in spec.stages
    }
