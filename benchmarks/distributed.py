"""finetune in 1, 2 and 4 processes on one machine: memory of each, and how far the result is from
one process's.

The processes share the rows of every batch, and each holds its part of what is trained (FSDP2).
They compute with one thread each and meet through gloo. Blocks are computed again for their
gradients. One process holds the teacher whole, several read it block by block; ratios leave it
out. A figure is the operating system's peak above what the process had when the stage began, after
the same stage on a small model had loaded the libraries; glibc gives back what is freed at once.

At the end stands what the dry run says of the published 10.6 B of Qwen-Image, which need no
weights for that.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ppcl_engine.data.calibration import CalibrationSet, save_calibration
from ppcl_engine.estimate.dry_run import print_estimate
from ppcl_engine.estimate.needs import needs
from ppcl_engine.models.opening import model_config
from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import FinetuneConfig
from ppcl_engine.system.atomic import write_json, write_text
from ppcl_engine.system.tensor_files import TensorFile

from .gpu.models import FORMS, QWEN, grid_of, plan_of
from .memory import QUICK, Scale, prepare
from .parallel import ROOT, launcher
from .shared import output
from .shared.teachers import WIDE

COPIES = 5  # weights, gradients, two moments, average
FULL = Scale({**WIDE, "num_attention_heads": 2}, (20, 20), 0, 0, fresh=True, repeats=1)
DEPTH = QUICK.depths[0]
SETTINGS = {
    "variant": "all",
    "name": "tuned",
    "steps": 3,
    "learning_rate": 1e-3,
    "warm_up": 1,
    "checkpointing": True,
    "device": "cpu",
}
CHILD = "--child"
MODEL = Path("qwen_image")


def train(*models_and_runs: Path) -> None:
    """finetune in this process, or with those that were launched beside it, on one model after the
    other; leaves the peak of the last one in its run folder."""
    from ppcl_engine.stages import run_stage
    from ppcl_engine.system.distributed import leave
    from ppcl_engine.system.machine import PeakMemory

    count = int(os.environ.get("WORLD_SIZE", "1"))
    for model, folder in zip(models_and_runs[::2], models_and_runs[1::2], strict=True):
        peak = PeakMemory("cpu")
        run_stage("finetune", config_of(model, folder, count))
        rank = os.environ.get("RANK", "0")
        write_json(folder / f"peak_{rank}.json", {"bytes": peak.above_start()})
    leave(0)


def config_of(model: Path, run: Path, count: int) -> FinetuneConfig:
    return FinetuneConfig(model=model, run=run, streamed=count > 1, **SETTINGS)


def measured(chosen, model: Path, prepared: Path, count: int) -> dict:
    """One launch: {"processes", "memory": [bytes of each], "predicted_bytes" by the dry run,
    "difference" from one process's result}."""
    folder = Path(shutil.copytree(prepared, prepared.with_name(f"processes_{count}")))
    if chosen.quick and count == 1:
        train(model, folder)
    else:
        # a small model first, which loads the libraries
        small, first = prepare(folder, QUICK, DEPTH), folder / f"prepared_{DEPTH}"
        command = [sys.executable, *launcher(count), "benchmarks.distributed", CHILD]
        command += map(str, (small, first, model, folder))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "100000"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    peaks = [json.loads(p.read_text())["bytes"] for p in sorted(folder.glob("peak_*.json"))]
    results = [Run(prepared.with_name(f"processes_{n}")).tuned_variant("tuned") for n in (count, 1)]
    said = needs(config_of(model, prepared, count), processes=count).memory
    return {
        "processes": count,
        "memory": peaks,
        "predicted_bytes": said,
        "difference": farthest(*results),
    }


def farthest(path: Path, alone: Path) -> float:
    """Largest relative difference of a tensor."""
    ours, theirs = TensorFile(path), TensorFile(alone)
    pairs = ((ours.read(name), theirs.read(name)) for name in theirs.keys())
    return max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs)


def of_one(folder: Path) -> dict[str, int]:
    """Bytes of what is trained, in all its copies, and of its largest block's weights."""
    file = TensorFile(Run(folder).tuned_variant("tuned"))
    sizes = {n: file.read(n).nbytes for n in file.keys() if n.startswith("weight.")}
    blocks: dict[str, int] = {}
    for name, size in sizes.items():
        block = ".".join(name.split(".")[1:3]) if "transformer_blocks" in name else ""
        blocks[block] = blocks.get(block, 0) + size
    blocks.pop("", None)
    return {"trained": COPIES * sum(sizes.values()), "block": max(blocks.values())}


def measure(chosen, folder: Path) -> dict:
    scale = QUICK if chosen.quick else FULL
    depth = scale.depths[0]
    model, prepared = prepare(folder, scale, depth), folder / f"prepared_{depth}"
    rows = [measured(chosen, model, prepared, count) for count in (1, *chosen.processes)]
    sizes = {"teacher": model.stat().st_size, **of_one(folder / "processes_1")}
    alone = max(rows[0]["memory"]) - sizes["teacher"]
    for row in rows:
        own = max(row["memory"]) - (sizes["teacher"] if row["processes"] == 1 else 0)
        row["ratio"] = own / alone
        row["blocks_above"] = (own - sizes["trained"] / row["processes"]) / sizes["block"]
    return {"rows": rows, **sizes}


def show(values: dict) -> None:
    lines = [
        [
            row["processes"],
            f"{max(row['memory']) / 1e6:.0f}",
            f"{row['predicted_bytes'] / 1e6:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['blocks_above']:.1f}",
            f"{row['difference']:.1e}",
        ]
        for row in values["rows"]
    ]
    sizes = {name: f"{values[name] / 1e6:.0f} MB" for name in ("trained", "teacher", "block")}
    title = "finetune: {trained} trained, teacher {teacher}, a block {block}".format(**sizes)
    output.print_table(
        title,
        ["processes", "MB each", "said", "ratio", "blocks above its part", "difference"],
        lines,
    )


def published(folder: Path) -> FinetuneConfig:
    """Fine-tuning of the published 10.6 B on batches of eight pictures of 1024 x 1024, a row of each
    for every process; there is all that its dry run reads."""
    run, config = Run(folder), model_config(MODEL)[2]
    plan = plan_of(config)
    variant = FORMS["10 B"].variant(plan)
    write_text(run.plan, plan.with_parts(variants=(variant,)).to_json())
    batch = QWEN.random_inputs(config, 8, grid_of(1024), 128, "cpu")
    save_calibration(run.calibration, CalibrationSet([batch], {}))
    settings = {"variant": variant.name, "streamed": True, "dtype": "bfloat16", "device": "cpu"}
    return FinetuneConfig(model=MODEL, run=folder, **settings)


def main(arguments: list[str] | None = None) -> Path | None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == [CHILD]:
        train(*map(Path, arguments[1:]))
        return None
    parser = output.options("distributed", __doc__)
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4], help="besides one")
    chosen = output.parse(parser, arguments)
    with tempfile.TemporaryDirectory(prefix="ppcl_distributed_") as name:
        values = measure(chosen, Path(name))
        show(values)
        print()
        print_estimate(published(Path(name) / "published"))
    last = values["rows"][-1]
    about = {"processes": last["processes"], "memory_ratio": last["ratio"]}
    return output.write(
        "distributed", chosen, {**about, "difference": last["difference"], **values}
    )


if __name__ == "__main__":
    main()
