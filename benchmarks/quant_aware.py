"""Students distilled through rounded weights (`--quant-aware`) against the same ones distilled
plainly: what it gives back.

Intervals, calibration, updates, learning rate and seeds are the same, the demo's. Errors are of the
final velocity, on samples that nothing was trained on; each row is the mean over seeds, each
difference that of the same samples and seeds (95 % bootstrap over samples); characters of all seeds
together (Wilson). Rows that are done are read from `runs/sparsity`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import nn

from ppcl_engine.algorithms.distillation.quantization import NONE
from ppcl_engine.data.calibration import save_calibration
from ppcl_engine.demo.run import FULL_SIZE, LEARNING_RATE, QUICK
from ppcl_engine.models.assembly import open_variant
from ppcl_engine.models.bundle import Bundle
from ppcl_engine.plan import PruningPlan, parse_intervals
from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import DistillDepthConfig
from ppcl_engine.stages.prune.distill_depth import distill_depth
from ppcl_engine.stages.run_students import RunStudents
from ppcl_engine.system.atomic import read_json, write_json, write_text

from .shared import output
from .shared.pruned_demo import DEMO, Context, judged, options, parse, prepare, quantised
from .shared.scoring import mean_with_interval, share_with_interval
from .shared.teachers import describe

SEEDS = (0, 1)
QUICK_INTERVALS, QUICK_BLOCKS = "1-2 3-4", 6
STUDENTS, WHOLE = "students", "whole model"
KINDS = ("int4", "int8")


@dataclass(frozen=True)
class Row:
    """trained: what --quant-aware was; bits: what weights are rounded to in the end, and where."""

    trained: str
    bits: str
    where: str

    @property
    def name(self) -> str:
        return "_".join(astuple(self)).replace(" ", "_")


def rows() -> Iterator[Row]:
    """Each training unrounded, and rounded to the bits that it was trained for; the plain training
    rounded to each kind."""
    for trained in (NONE, *KINDS):
        yield Row(trained, NONE, "")
        for bits in KINDS if trained == NONE else (trained,):
            yield from (Row(trained, bits, where) for where in (STUDENTS, WHOLE))


def base_plan(context: Context, intervals: str) -> PruningPlan:
    weights = context.teacher.weights
    return PruningPlan(
        architecture=weights.architecture.name,
        config=weights.config,
        num_blocks=weights.num_blocks,
        fingerprint=weights.fingerprint,
        intervals=parse_intervals(intervals),
    )


def trained_run(context: Context, plan: PruningPlan, kind: str, seed: int, rounds: int) -> Run:
    """One folder a seed and setting; distilling goes on from what is there."""
    run = Run(context.folder / "quant_aware" / f"{kind}_{seed}")
    if not run.plan.exists():
        save_calibration(run.calibration, context.calibration)
        write_text(run.plan, plan.to_json())
    common = {"model": context.path, "run": run.folder, "device": "cpu", "seed": seed}
    distill_depth(
        DistillDepthConfig(**common, rounds=rounds, learning_rate=LEARNING_RATE, quant_aware=kind)
    )
    return run


def opened(context: Context, run: Run, row: Row) -> nn.Module:
    teacher, plan = context.teacher, run.load_plan()
    architecture, config = teacher.architecture, teacher.config
    students = RunStudents(run, config, architecture)
    model = open_variant(
        teacher.weights, students, plan, plan.everything(), teacher.dtype, teacher.device
    )
    prefixes = [architecture.block_prefix(config, interval.first) for interval in plan.intervals]
    return quantised(model, row.bits, tuple(prefixes) if row.where == STUDENTS else ("",))


def measure(context: Context, plan: PruningPlan, row: Row, seed: int, rounds: int) -> dict:
    path = context.folder / f"quant_aware_{len(context.judge.texts)}" / f"{row.name}_{seed}.json"
    if not path.exists():
        start, run = time.monotonic(), trained_run(context, plan, row.trained, seed, rounds)
        with torch.no_grad():
            values = judged(context, opened(context, run, row), row.name)
        write_json(path, {**values, "seconds": time.monotonic() - start})
    values = read_json(path)
    print(
        f"\n{row.name} seed {seed}: velocity error {values['velocity_error']['value']:.4f}",
        flush=True,
    )
    return values


def together(row: Row, found: list[dict], captions: int) -> dict:
    """One row of all its seeds."""
    read = sum(values["characters"]["value"] for values in found) / len(found)
    return {
        "trained": row.trained,
        "bits": row.bits,
        "where": row.where,
        "velocity_error": mean_with_interval(mean_rows(found)),
        "seeds": [values["velocity_error"]["value"] for values in found],
        "characters": share_with_interval(read, captions * len(found)),
    }


def mean_rows(found: list[dict]) -> list[float]:
    """Each sample's error, averaged over the seeds."""
    return torch.tensor([values["velocity_rows"] for values in found]).mean(0).tolist()


def difference(row: Row, done: dict[Row, list[dict]]) -> dict:
    """Trained through rounded weights minus trained plainly, both in the same bits at the end, and
    what the bits themselves add to the plain one: `returned` is their ratio, of the means."""
    ours, plain, untouched = (
        done[key] for key in (row, Row(NONE, row.bits, row.where), Row(NONE, NONE, ""))
    )

    def pairs(left: list[dict], right: list[dict]) -> list[float]:
        return [a - b for a, b in zip(mean_rows(left), mean_rows(right), strict=True)]

    change = mean_with_interval(pairs(ours, plain))
    values = {"trained": row.trained, "bits": row.bits, "where": row.where, "difference": change}
    values["seeds"] = [
        a["velocity_error"]["value"] - b["velocity_error"]["value"]
        for a, b in zip(ours, plain, strict=True)
    ]
    if row.bits != NONE:
        values["bits_add"] = mean_with_interval(pairs(plain, untouched))
        values["returned"] = -change["value"] / values["bits_add"]["value"]
    return values


def run(chosen) -> dict:
    context = prepare(chosen, QUICK_BLOCKS)
    bundled = Bundle(DEMO).plan
    ours = context.teacher.weights.fingerprint == bundled.fingerprint
    intervals = chosen.intervals or (
        " ".join(i.name for i in bundled.intervals) if ours else QUICK_INTERVALS
    )
    plan, rounds = base_plan(context, intervals), (QUICK if chosen.quick else FULL_SIZE)["rounds"]
    seeds = SEEDS[:1] if chosen.quick else SEEDS
    done = {row: [measure(context, plan, row, seed, rounds) for seed in seeds] for row in rows()}
    found = [together(row, values, len(context.judge.texts)) for row, values in done.items()]
    return {
        "rows": found,
        "differences": [difference(row, done) for row in done if row.trained != NONE],
        "intervals": intervals,
        "seeds": list(seeds),
        "rounds": rounds,
        "teacher": describe(context.path, context.teacher.weights),
    }


def show(values: dict) -> None:
    lines = []
    for row in values["rows"]:
        shares = [f"{100 * row['characters'][key]:.1f}" for key in ("value", "low", "high")]
        lines.append(
            (
                _name(row),
                _cell(row["velocity_error"], ""),
                f"{shares[0]} ({shares[1]} - {shares[2]})",
            )
        )
    output.print_table(
        "distilled, then rounded", ("model", "velocity error", "characters %"), lines
    )
    lines = [
        (
            _name(d),
            _cell(d["difference"], "+"),
            f"{100 * d['returned']:.0f} %" if "returned" in d else "-",
        )
        for d in values["differences"]
    ]
    output.print_table(
        "quant-aware - plain", ("model", "velocity error", "of what the bits add"), lines
    )


def _name(row: dict) -> str:
    return f"distilled with {row['trained']}, {row['bits']} {row['where']}".rstrip()


def _cell(value: dict, sign: str) -> str:
    middle, low, high = (f"{value[key]:{sign}.4f}" for key in ("value", "low", "high"))
    return f"{middle} ({low} - {high})"


def main(arguments: list[str] | None = None) -> Path:
    parser = options("quant_aware", __doc__)
    parser.add_argument("--intervals", default="", help="as '3-4 8-10' (default: the demo's)")
    chosen = parse(parser, arguments)
    values = run(chosen)
    show(values)
    return output.write("quant_aware", chosen, values)


if __name__ == "__main__":
    main()
