"""Peak memory against depth: streamed stages stay flat from 15 to 60 blocks, resident ones grow.

Every measurement is a fresh process; its peak is the operating system's own (VmHWM: resident and
mapped pages together). Where a freed buffer goes back to the system depends on when the reading
thread ran, which moves single streamed peaks by a few percent: the highest of `REPEATS` runs
counts. `identical`: streamed and resident runs wrote the same files, byte for byte.
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
from dataclasses import dataclass, replace
from pathlib import Path

from ppcl_engine.architectures.qwen_image import QwenImage
from ppcl_engine.data.calibration import CalibrationSet, save_calibration
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


def run_stage(
    stage: str, model: Path, run: Path, streamed: bool, rounds: int, updates: int
) -> dict:
    """Runs a stage in this process: {"peak": bytes, "seconds"}."""
    from ppcl_engine.stages.prune.detect_width import detect_width
    from ppcl_engine.stages.prune.distill_depth import distill_depth
    from ppcl_engine.stages.prune.finetune import finetune
    from ppcl_engine.stages.prune.polish import polish
    from ppcl_engine.stages.prune.probe import probe

    common = {"model": model, "run": run, "streamed": streamed, "device": "cpu"}
    start = time.perf_counter()
    if stage == "probe":
        probe(ProbeConfig(**common))
    elif stage == "distill_depth":
        shutil.rmtree(Run(run).students)  # other stages' students are copies that were not trained
        distill_depth(DistillDepthConfig(**common, rounds=rounds, updates=updates))
    elif stage == "detect_width":
        detect_width(DetectWidthConfig(**common, **SITES, samples=BATCHES * SAMPLES))
    elif stage == "polish":
        polish(PolishConfig(**common, **TUNING))
    elif stage == "finetune":
        finetune(FinetuneConfig(**common, **TUNING, variant="all", name="tuned"))
    else:
        from diffusers import QwenImageTransformer2DModel  # noqa: F401
    return {"peak": peak_bytes(), "seconds": round(time.perf_counter() - start, 2)}


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


def measured(folder: Path, scale: Scale) -> list[dict]:
    """One row a run: {"depth", "stage", "streamed", "peak", "seconds", "digest"}."""
    rows = []
    for depth in scale.depths:
        model = prepare(folder, scale, depth)
        for stage in STAGES:
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


def summary(rows: list[dict]) -> dict:
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
    same = {stage: same_files(stage) for stage in STAGES}
    ratios = {mode: {stage: ratio(stage, flag) for stage in STAGES} for mode, flag in modes.items()}
    return {
        **{stage: peaks(stage, True) for stage in STAGES},
        "resident": {stage: peaks(stage, False) for stage in STAGES},
        "ratios": ratios,
        "identical": all(same.values()),
        "identical_stages": same,
        "goal_met": max(ratios["streamed"].values()) <= FLAT
        and min(ratios["resident"].values()) >= GROWS,
        "runs": [
            {name: row[name] for name in ("stage", "depth", "streamed", "peak", "seconds")}
            for row in rows
        ],
    }


def show(values: dict, depths: tuple[int, int]) -> None:
    rows = []
    for mode in ("streamed", "resident"):
        for stage in STAGES:
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
    chosen: Namespace = output.parse(parser, arguments)
    scale = QUICK if chosen.quick else FULL
    if chosen.depths:
        scale = replace(scale, depths=tuple(chosen.depths))
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="ppcl_memory_") as name:
        imports = measure(IMPORTS, Path(name), Path(name), True, scale)["peak"]
        values = {**summary(measured(Path(name), scale)), "imports": imports}
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
