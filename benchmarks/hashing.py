"""What it costs to compare every tensor with its hash: loading a model with and without, in turn.

A load is `open_model` of a single file of ours in bfloat16: from the disk, as the first one after a
start of the machine, and from the operating system's page cache. Without: the hashes of this very
file were compared before, as they are on every load but the first. The share is of the shortest of
all rounds, since other processes only add; the share of processor time is beside it.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import torch

from ppcl_engine import open_model
from ppcl_engine.architectures import architecture_named
from ppcl_engine.system import hashes

from .shared import output
from .shared.teachers import random_teacher

FULL = {
    "attention_head_dim": 128,
    "num_attention_heads": 8,
    "num_layers": 6,
    "axes_dims_rope": [16, 56, 56],
}
QUICK = {
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "num_layers": 2,
    "axes_dims_rope": [4, 14, 14],
}


def load(path: Path, checked: bool, cached: bool) -> tuple[float, float]:
    """(seconds, seconds of processors)"""
    if not checked:
        hashes.forget()
    if not cached:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begun, worked = time.perf_counter(), time.process_time()
    open_model(path, dtype=torch.bfloat16)
    return time.perf_counter() - begun, time.process_time() - worked


def measure(path: Path, rounds: int, cached: bool) -> dict:
    load(path, False, cached)
    rows = {True: [], False: []}
    for number in range(rounds):
        for checked in (True, False) if number % 2 else (False, True):
            rows[checked].append(load(path, checked, cached))
    best = {
        checked: [min(column) for column in zip(*found, strict=True)]
        for checked, found in rows.items()
    }
    return {
        "seconds_without": best[True][0],
        "seconds_with": best[False][0],
        "share": best[False][0] / best[True][0] - 1,
        "processor_share": best[False][1] / best[True][1] - 1,
    }


def main(arguments: list[str] | None = None) -> Path:
    parser = output.options("hashing", __doc__)
    parser.add_argument("--rounds", type=int, help="loads of each kind (12)")
    chosen = output.parse(parser, arguments)
    config = {
        **architecture_named("qwen_image").tiny_config,
        **(QUICK if chosen.quick else FULL),
        "joint_attention_dim": 256,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "teacher.safetensors"
        random_teacher(path, config, seed=0, dtype=torch.bfloat16)
        rounds = chosen.rounds or (2 if chosen.quick else 12)
        values = {
            "bytes": path.stat().st_size,
            "rounds": rounds,
            "disk": measure(path, rounds, cached=False),
            "page_cache": measure(path, rounds, cached=True),
        }
    print(f"a file of {values['bytes'] / 1e9:.2f} GB")
    for name in ("disk", "page_cache"):
        row = values[name]
        print(
            f"{name:10} {row['seconds_without']:.3f} s, with hashes {row['seconds_with']:.3f} s: "
            f"{100 * row['share']:+.1f} % (processors {100 * row['processor_share']:+.1f} %)"
        )
    return output.write("hashing", chosen, values)


if __name__ == "__main__":
    main()
