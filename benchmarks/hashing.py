"""What it costs to compare every tensor with its hash: loading a model with and without, in turn,
from the page cache.

A load is `open_model` of a single file of ours in bfloat16. Without: the hashes of this very file
were compared before, as they are on every load but the first. The share is of the shortest of all
rounds, since other processes only add; the share of processor time is beside it, as the thread that
hashes does so while the other reads. From a disk the share is smaller.
"""

from __future__ import annotations

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


def load(path: Path, checked: bool) -> tuple[float, float]:
    """(seconds, seconds of processors)"""
    if not checked:
        hashes.forget()
    begun, worked = time.perf_counter(), time.process_time()
    open_model(path, dtype=torch.bfloat16)
    return time.perf_counter() - begun, time.process_time() - worked


def measure(path: Path, rounds: int) -> dict:
    load(path, False)
    rows = {True: [], False: []}
    for number in range(rounds):
        for checked in (True, False) if number % 2 else (False, True):
            rows[checked].append(load(path, checked))
    best = {
        checked: [min(column) for column in zip(*found, strict=True)]
        for checked, found in rows.items()
    }
    return {
        "bytes": path.stat().st_size,
        "seconds_without": best[True][0],
        "seconds_with": best[False][0],
        "share": best[False][0] / best[True][0] - 1,
        "processor_share": best[False][1] / best[True][1] - 1,
        "rounds": rounds,
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
        values = measure(path, chosen.rounds or (2 if chosen.quick else 12))
    print(
        f"{values['bytes'] / 1e9:.2f} GB: {values['seconds_without']:.3f} s, with hashes {values['seconds_with']:.3f} s: "
        f"{100 * values['share']:+.1f} % (processors {100 * values['processor_share']:+.1f} %)"
    )
    return output.write("hashing", chosen, values)


if __name__ == "__main__":
    main()
