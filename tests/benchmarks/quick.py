"""The benchmarks' quick forms, and the tiny random teacher that they run on."""

import json
from pathlib import Path

from benchmarks.shared import teachers
from benchmarks.shared.teachers import random_teacher
from ppcl_engine.data.rendered.tables import fit_codec

CONFIG = {**teachers.NARROW, "num_layers": 6}
ABOUT = {"quick", "command", "machine", "versions"}


def quick_teacher(folder: Path) -> Path:
    path = folder / "teacher.safetensors"
    random_teacher(path, CONFIG, seed=0, codec=fit_codec(0, samples=16))
    return path


def run(benchmark, folder, *options):
    path = benchmark.main(["--quick", "--output", str(folder), *map(str, options)])
    values = json.loads(path.read_text())
    assert path.parent == folder and values.keys() >= ABOUT
    assert values["command"].startswith(
        f"python -m {benchmark.__name__.removesuffix('.__main__')} --quick"
    )
    assert values["machine"]["threads"] >= 1 and values["versions"].keys() >= {"torch", "diffusers"}
    return values
