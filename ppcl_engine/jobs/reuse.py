"""What a new run takes over from another one, as hard links, or as copies where links are
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
"""What stages leave for later ones."""
CHECKED = ("probes", "curves.safetensors")
"""Products that hold their settings, and are made anew where these differ."""
# of all that stages keep there, only calibrate's is gone on from
SCRATCH, RESUMED = "states", "calibrate"
OF_ONE_JOB = {SPEC_FILE, STATE, EVENTS, CANCEL, LOCK, HOLDER, LOG, PREVIEW}
COPIED = {".json", ".jsonl", ".csv", ".txt", ".html"}
NOT_THE_STUDENTS = {"model", "run", "device", "streamed", "dry_run", "intervals", "parallel"}
"""Settings of distill-depth that change no student."""


def seed_from_upstream(
    upstream: Path, folder: Path, spec: JobSpec, depth_made_with: dict | None
) -> None:
    """All products that the order's stages do not make anew. `depth_made_with`: settings of the
    upstream's students."""
    dropped = _made_anew(spec, depth_made_with)
    for name in PRODUCTS:
        if name not in dropped:
            take(upstream / name, folder / name)


def seed_attempt(earlier: Path, folder: Path) -> None:
    """All that an attempt of the same order left, but what tells of that job alone."""
    for path in sorted(earlier.iterdir()):
        if path.name not in OF_ONE_JOB | {SCRATCH} and not path.name.startswith("."):
            take(path, folder / path.name)
    take(earlier / SCRATCH / RESUMED, folder / SCRATCH / RESUMED)


def seed_from_sibling(sibling: Path, folder: Path, spec: JobSpec, its_spec: JobSpec) -> None:
    """What the stages of a changed job would accept of another run's files, where it is not there
    yet.

    On the demo's teacher a detection with another `remove` took 14 s instead of 55 s by this, most
    of them Python's start; on 20 B it is hours of sweeps.
    """
    if _models(spec) != _models(its_spec):
        return
    for name in CHECKED:
        if not (folder / name).exists():
            take(sibling / name, folder / name)
    if not (folder / "depth").exists() and _same_lessons(sibling, folder, spec, its_spec):
        take(sibling / "depth", folder / "depth")


def take(source: Path, target: Path) -> None:
    """A file, or all files of a folder; neither links nor what is half written."""
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
    """Gigabytes of states between blocks, which a killed stage leaves."""
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


def _made_anew(spec: JobSpec, depth_made_with: dict | None) -> set[str]:
    stages, dropped = dict(spec.stages), set()
    depth = stages.get("distill-depth")
    if (
        depth is not None
        and depth_made_with is not None
        and _lesson(depth) != _lesson(depth_made_with)
    ):
        dropped |= {"depth", "width", "polished"}
    if {"detect-width", "distill-width"} & set(stages):
        dropped |= {"width", "polished"}
    return dropped | ({"polished"} if "polish" in stages else set())


def _lesson(settings: dict) -> dict:
    """All settings of distill-depth that change its students, defaults filled in."""
    spec = JobSpec(stages=(("distill-depth", settings),))
    config = configs(spec, Path())[0][1]
    return {name: value for name, value in vars(config).items() if name not in NOT_THE_STUDENTS}


def _same_lessons(sibling: Path, folder: Path, spec: JobSpec, its_spec: JobSpec) -> bool:
    ours, theirs = (dict(o.stages).get("distill-depth") for o in (spec, its_spec))
    if ours is None or theirs is None or _lesson(ours) != _lesson(theirs):
        return False
    sets = [dict(o.stages).get("calibrate") for o in (spec, its_spec)]
    if any(sets):
        return sets[0] == sets[1] and spec.upstream == its_spec.upstream
    files = [path / CALIBRATION for path in (folder, sibling)]
    return all(f.is_file() for f in files) and sha256_of(files[0]) == sha256_of(files[1])


def _models(spec: JobSpec) -> set[str]:
    return {
        str(settings.get("model", settings.get("base") or settings.get("path")))
        for _, settings in spec.stages
    }
