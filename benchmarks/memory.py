"""Peak memory against depth: streamed stages stay flat from 15 to 60 blocks, resident ones grow.

Every measurement is a fresh process; its peak is the operating system's own (VmHWM: resident and
mapped pages together). Where a freed buffer goes back to the system depends on when the reading
thread ran, which moves single streamed peaks by a few percent: the highest of `REPEATS` runs
counts. The host's memory is the device's here, so streamed stages are told that nothing of it is
free: states and students that would wait there wait in files. `identical`: streamed and resident runs wrote the same files, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

from ppcl_engine.algorithms.distillation import kept_trainers
from ppcl_engine.architectures.qwen_image import QwenImage
from ppcl_engine.data.calibration import CalibrationSet, save_calibration
from ppcl_engine.models import streaming
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import PruningPlan
from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import (
    DetectWidthConfig,
    DistillDepthConfig,
    FinetuneConfig,
    PolishConfig,
    ProbeConfig,
)
from ppcl_engine.stages.prune.detect_width import detect_width
from ppcl_engine.stages.prune.distill_depth import distill_depth
from ppcl_engine.stages.prune.finetune import finetune
from ppcl_engine.stages.prune.polish import polish
from ppcl_engine.stages.prune.probe import probe
from ppcl_engine.system.atomic import write_text
from ppcl_engine.system.tensor_files import write_tensors

from .shared import output
from .shared.teachers import (
    BATCHES,
    GRID,
    NARROW,
    SAMPLES,
    TEXT_TOKENS,
    WIDE,
    intervals,
    origin,
    peak_bytes,
    random_teacher,
)

STAGES = ("probe", "distill_depth", "detect_width", "polish", "finetune")
IMPORTS = "imports"  # a process that loads the libraries and stops: the floor under every figure
# of detect-width
SITES = {"share": 0.5, "longest": 1, "kinds": "text ffn_image", "form": "gated", "cache_gb": 0.1}
# of polish and finetune; on disk, since the host's memory is the device's here
TUNING = {"steps": 2, "save_every": 2, "offload": "disk"}
TUNED = ("polish", "finetune")  # write 20 GB a run at 60 blocks: once
REPEATS = 3  # of other streamed runs; resident ones are ruled by the weights
FLAT, GROWS = 1.05, 2.0  # the goals


@dataclass(frozen=True)
class Scale:
    config: dict
    depths: tuple[int, int]
    rounds: int
    updates: int
    fresh: bool
    repeats: int


FULL = Scale(WIDE, (15, 60), rounds=2, updates=4, fresh=True, repeats=REPEATS)
QUICK = Scale(NARROW, (5, 10), rounds=1, updates=2, fresh=False, repeats=1)


def prepare(folder: Path, scale: Scale, depth: int) -> Path:
    """The random teacher of this depth and a run folder with calibration and plan; returns the
    teacher's file."""
    import torch

    model = folder / f"teacher_{depth}.safetensors"
    random_teacher(model, {**scale.config, "num_layers": depth}, seed=depth)
    weights = Weights(model)
    torch.manual_seed(0)
    batches = [
        QwenImage().random_inputs(weights.config, SAMPLES, GRID, TEXT_TOKENS, "cpu")
        for _ in range(BATCHES)
    ]
    for batch in batches:
        batch["clean"] = torch.randn_like(batch["hidden_states"])
    run = Run(folder / f"prepared_{depth}")
    save_calibration(run.calibration, CalibrationSet(batches, origin(weights)))
    plan = PruningPlan(
        architecture="qwen_image",
        config=weights.config,
        num_blocks=depth,
        fingerprint=weights.fingerprint,
        intervals=intervals(depth),
    )
    write_text(run.plan, plan.to_json())
    for interval in plan.intervals:
        block = weights.block(interval.first, torch.float32, "cpu").state_dict()
        tensors = {f"weight.{name}": tensor for name, tensor in block.items()}
        write_tensors(run.student(interval.name), tensors, {"settings": "{}", "step": "0"})
    return model


@contextmanager
def nothing_free() -> Iterator[None]:
    with (
        patch.object(streaming, "free_memory", lambda *device: 0),
        patch.object(kept_trainers, "free_memory", lambda *device: 0),
    ):
        yield


def run_stage(
    stage: str, model: Path, run: Path, streamed: bool, rounds: int, updates: int
) -> dict:
    """Runs a stage in this process: {"peak": bytes, "seconds"}."""
    common = {"model": model, "run": run, "streamed": streamed, "device": "cpu"}
    start = time.perf_counter()
    with nothing_free() if streamed else nullcontext():
        _do(stage, common, rounds, updates)
    return {"peak": peak_bytes(), "seconds": round(time.perf_counter() - start, 2)}


def _do(stage: str, common: dict, rounds: int, updates: int) -> None:
    if stage == "probe":
        probe(ProbeConfig(**common))
    elif stage == "distill_depth":
        # other stages' students are copies that were not trained
        shutil.rmtree(Run(common["run"]).students)
        distill_depth(DistillDepthConfig(**common, rounds=rounds, updates=updates))
    elif stage == "detect_width":
        detect_width(DetectWidthConfig(**common, **SITES, samples=BATCHES * SAMPLES))
    elif stage == "polish":
        polish(PolishConfig(**common, **TUNING))
    elif stage == "finetune":
        finetune(FinetuneConfig(**common, **TUNING, variant="all", name="tuned"))
    else:
        from diffusers import QwenImageTransformer2DModel  # noqa: F401


def measure(stage: str, model: Path, run: Path, streamed: bool, scale: Scale) -> dict:
    """`run_stage` in a fresh process (quick runs: in this one, whose peak then means nothing)."""
    if not scale.fresh and stage != IMPORTS:
        return run_stage(stage, model, run, streamed, scale.rounds, scale.updates)
    command = [sys.executable, "-m", "benchmarks.memory", "--child", stage, str(model), str(run)]
    command += [str(int(streamed)), str(scale.rounds), str(scale.updates)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def digest(folder: Path) -> str:
    """A hash of the names and bytes of all files that a stage left."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(str(path.relative_to(folder)).encode())
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def measured(folder: Path, scale: Scale, stages: Sequence[str]) -> list[dict]:
    """One row a run: {"depth", "stage", "streamed", "peak", "seconds", "digest"}."""
    rows = []
    for depth in scale.depths:
        model = prepare(folder, scale, depth)
        for stage in stages:
            for streamed in (*[True] * (1 if stage in TUNED else scale.repeats), False):
                run = folder / "run"
                shutil.copytree(folder / f"prepared_{depth}", run)
                row = measure(stage, model, run, streamed, scale)
                rows.append(
                    {
                        "depth": depth,
                        "stage": stage,
                        "streamed": streamed,
                        **row,
                        "digest": digest(run),
                    }
                )
                shutil.rmtree(run)
                mode = "streamed" if streamed else "resident"
                print(
                    f"{stage} {mode} {depth} blocks: {row['peak'] / 1e6:.0f} MB, {row['seconds']} s",
                    flush=True,
                )
        model.unlink()
    return rows


def summary(rows: list[dict], stages: Sequence[str]) -> dict:
    def by_depth(stage: str, streamed: bool, field: str) -> dict[str, list]:
        found: dict[str, list] = {}
        for row in rows:
            if (row["stage"], row["streamed"]) == (stage, streamed):
                found.setdefault(str(row["depth"]), []).append(row[field])
        return found

    def peaks(stage: str, streamed: bool) -> dict[str, int]:
        return {depth: max(values) for depth, values in by_depth(stage, streamed, "peak").items()}

    def ratio(stage: str, streamed: bool) -> float:
        shallow, deep = peaks(stage, streamed).values()
        return round(deep / shallow, 4)

    def same_files(stage: str) -> bool:
        resident = by_depth(stage, False, "digest")
        return all(
            set(found) == set(resident[depth])
            for depth, found in by_depth(stage, True, "digest").items()
        )

    modes = {"streamed": True, "resident": False}
    return {
        **{stage: peaks(stage, True) for stage in stages},
        "resident": {stage: peaks(stage, False) for stage in stages},
        "ratios": {mode: {s: ratio(s, flag) for s in stages} for mode, flag in modes.items()},
        "identical_stages": {stage: same_files(stage) for stage in stages},
        "runs": [
            {name: row[name] for name in ("stage", "depth", "streamed", "peak", "seconds")}
            for row in rows
        ],
    }


def joined(before: dict, values: dict) -> dict:
    """Stages that were measured before and not now stay as they were."""
    measured_now = set(values["identical_stages"])
    kept = [row for row in before.get("runs", ()) if row["stage"] not in measured_now]
    both = {**{stage: before[stage] for stage in STAGES if stage in before}, **values}
    for name in ("resident", "identical_stages"):
        both[name] = {**before.get(name, {}), **values[name]}
    ratios = before.get("ratios", {})
    both["ratios"] = {
        mode: {**ratios.get(mode, {}), **found} for mode, found in values["ratios"].items()
    }
    streamed, resident = (both["ratios"][mode].values() for mode in ("streamed", "resident"))
    return {
        **both,
        "runs": [*kept, *values["runs"]],
        "identical": all(both["identical_stages"].values()),
        "goal_met": max(streamed) <= FLAT and min(resident) >= GROWS,
    }


def show(values: dict, depths: tuple[int, int]) -> None:
    rows = []
    for mode in ("streamed", "resident"):
        for stage in values["identical_stages"]:
            peaks = values[stage] if mode == "streamed" else values["resident"][stage]
            sizes = [f"{peaks[str(depth)] / 1e6:.0f} MB" for depth in depths]
            ratio, same = values["ratios"][mode][stage], values["identical_stages"][stage]
            rows.append([f"{stage} {mode}", *sizes, f"{ratio:.3f}", same])
    header = ["stage", *(f"{depth} blocks" for depth in depths), "ratio", "same files"]
    output.print_table(
        f"peak memory (libraries alone: {values['imports'] / 1e6:.0f} MB)", header, rows
    )


def main(arguments: list[str] | None = None) -> Path:
    parser = output.options("memory", __doc__)
    parser.add_argument(
        "--folder",
        type=Path,
        help="where temporary files go (30 GB pass through; on a disk, not in memory)",
    )
    parser.add_argument("--depths", type=int, nargs=2, help="other depths than 15 and 60")
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=STAGES,
        help="these alone; the result's other stages stay",
    )
    chosen: Namespace = output.parse(parser, arguments)
    scale = QUICK if chosen.quick else FULL
    if chosen.depths:
        scale = replace(scale, depths=tuple(chosen.depths))
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="ppcl_memory_") as name:
        imports = measure(IMPORTS, Path(name), Path(name), True, scale)["peak"]
        rows = measured(Path(name), scale, chosen.stages)
    known = chosen.output / "memory.json"
    before = json.loads(known.read_text()) if known.exists() else {}
    values = {**joined(before, summary(rows, chosen.stages)), "imports": imports}
    values |= {
        "teacher": scale.config,
        "intervals": {str(d): len(intervals(d)) for d in scale.depths},
    }
    show(values, scale.depths)
    return output.write("memory", chosen, values)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        stage, model, run, *numbers = sys.argv[2:]
        streamed, rounds, updates = map(int, numbers)
        print(json.dumps(run_stage(stage, Path(model), Path(run), bool(streamed), rounds, updates)))
    else:
        main()
