"""PPCL against every baseline, on the bundled teacher: the paper's ladder, equal parameters, three
sizes of one training.

Every row has the same calibration data and the same budget of block passes, half of it for the same
learning-rate search. Scores are on captions and samples that nothing was trained on, with 95 %
bootstrap intervals. Rows that are done are read from `runs/ablation`, so an interrupted run goes
on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ppcl_engine.data.calibration import save_calibration
from ppcl_engine.data.rendered.tables import fit_codec
from ppcl_engine.demo.bundled import TEACHERS, bundled
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.streaming import Teacher
from ppcl_engine.models.weights import Weights, expected_shapes
from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import DetectConfig, ProbeConfig
from ppcl_engine.stages.prune.detect import detect
from ppcl_engine.stages.prune.probe import probe
from ppcl_engine.system.atomic import read_json, replacing, write_json

from ..shared import output
from ..shared.scoring import Judge
from ..shared.teachers import NARROW, describe, random_teacher, rendered
from . import chart
from .half import half_row, trained_longer
from .rows import (
    PAPER,
    Build,
    Context,
    Recipe,
    baseline_row,
    intervals,
    recipe_row,
    sequential_row,
    trained,
)
from .sizes import one_training, subsets

BUDGET = 16_000  # block passes of a row
# of the longer training, and enough for a narrow interval
HALF_BUDGET, HALF_CAPTIONS = 80_000, 2_000
CAPTIONS, SAMPLES, BATCH, QUICK_BATCH = 300, 480, 48, 8
PAPER_REMOVED = 25 / 60  # of the blocks
OURS_REMOVED = 1 / 4  # of the blocks, where half of the parameters go; width takes the rest
# of the budget: students and projections alone, which switch
PARTS = {"depth": 0.35, "width": 0.1, "polish": 0.55}
TUNED = {"depth": 0.25, "width": 0.05, "polish": 0.3, "finetune": 0.4}
TINY = {**NARROW, "num_layers": 6}  # the teacher of a quick run
SIZES = {"large": 0.684, "medium": 0.584, "small": 0.519}  # 13.97, 11.93 and 10.60 of 20.43 B
TABLES = ("ladder", "equal_parameters", "sizes")
HALF = -1.0  # stands for `half` of the teacher at hand
OTHERS = ("tinyfusion", "hierarchical_prune", "cosine", "mse", "every_second", "random_contiguous")


@dataclass(frozen=True)
class Row:
    table: str
    name: str
    build: Callable[[Context], Build]

    @property
    def folder(self) -> str:
        return f"{self.table}-{self.name}".replace(" ", "_").replace("+", "with").replace(",", "")


def rows() -> list[Row]:
    """In the order in which they run; what a row needs of the context is looked up when its turn
    comes."""
    ladder, equal = "ladder", "equal_parameters"

    def paper(width: dict | None, shares: dict[str, float]) -> Callable[[Context], Build]:
        def build(c: Context) -> Build:
            chosen = width and {
                **width,
                "share": half(c) if width["share"] == HALF else width["share"],
            }
            return recipe_row(Recipe(intervals=greedy(c), depth=PAPER, width=chosen, shares=shares))

        return build

    text = {"method": "cka", "form": "paper", "kinds": "text", "share": 0.56}
    both = {"method": "cka", "form": "paper", "share": 0.519}
    at_half = {"method": "cka", "form": "paper", "share": HALF}
    return [
        Row(equal, "ours", lambda c: recipe_row(ours(c, half(c), TUNED))),
        Row(equal, "ours, parts only", lambda c: recipe_row(ours(c, half(c), PARTS))),
        Row(equal, "ppcl", paper(at_half, {"depth": 0.5, "width": 0.25, "finetune": 0.25})),
        *(
            Row(equal, name, lambda c, name=name: baseline_row(name, c.teacher.num_blocks // 2))
            for name in OTHERS
        ),
        Row(
            ladder,
            "cka_sequential",
            lambda c: baseline_row("cka_sequential", removed(c, PAPER_REMOVED)),
        ),
        Row(ladder, "+ linear probes", lambda c: sequential_row(greedy(c))),
        Row(ladder, "+ non-sequential", paper(None, {"depth": 1.0})),
        Row(ladder, "+ text", paper(text, {"depth": 0.75, "width": 0.25})),
        Row(ladder, "+ FFN", paper(both, {"depth": 0.65, "width": 0.35})),
        Row(ladder, "+ fine-tune", paper(both, {"depth": 0.45, "width": 0.25, "finetune": 0.3})),
        Row("sizes", "separate large", lambda c: recipe_row(ours(c, SIZES["large"], PARTS))),
        Row("sizes", "separate medium", lambda c: recipe_row(ours(c, SIZES["medium"], PARTS))),
        Row("sizes", "one training small", lambda c: recipe_row(ours(c, SIZES["small"], PARTS))),
    ]


def removed(context: Context, share: float) -> int:
    return max(1, round(context.teacher.num_blocks * share))


def greedy(context: Context) -> str:
    return intervals(context, "ppcl", removed(context, PAPER_REMOVED))


def half(context: Context) -> float:
    """Share of the parameters that a model without half of its blocks, of each kind, has: what the
    baselines get."""
    shapes = expected_shapes(context.teacher.architecture, context.teacher.config)
    count = {name: math.prod(shape) for name, shape in shapes.items()}
    prefix = partial(context.teacher.architecture.block_prefix, context.teacher.config)
    blocks = tuple(map(prefix, range(context.teacher.num_blocks)))
    return 1 - sum(size for name, size in count.items() if name.startswith(blocks)) / 2 / sum(
        count.values()
    )


def ours(context: Context, share: float, shares: dict[str, float]) -> Recipe:
    """Intervals by measured damage, affine starts, width in the cheapest forms, polish, and a
    fine-tune where it is asked for."""
    count = removed(context, OURS_REMOVED * 2 * (1 - share))
    width = {"method": "damage", "form": "best", "share": share, "samples": 48}
    return Recipe(
        intervals=intervals(context, "budget", count), width=width, shares=shares, finetune_rate=0.3
    )


def measure(context: Context, judge: Judge, row: Row, build: Build, folder: Path) -> dict:
    """Trains and scores one row, or reads what an earlier run left."""
    path = folder / row.folder / "row.json"
    if path.exists():
        return read_json(path)
    start = time.monotonic()
    model, search = trained(context, build, folder / row.folder, judge.validation_error)
    values = {"name": row.name, "table": row.table, **judge.score(model, row.name), **search}
    values |= subsets(context, judge, row.name, model, folder / row.folder / "run")
    values["seconds"] = time.monotonic() - start
    write_json(path, values)
    return values


def prepare(chosen, folder: Path) -> tuple[Context, Judge]:
    weights = Weights(chosen.teacher)
    teacher = Teacher(weights, torch.float32, "cpu", streamed=False)
    batch = BATCH if not chosen.quick else QUICK_BATCH
    samples = SAMPLES if not chosen.quick else 2 * batch
    calibration = rendered(chosen.teacher, weights, samples, batch, seed=0)
    base = Run(folder / "base")
    if not base.calibration.exists():
        save_calibration(base.calibration, calibration)
    settings = {
        "longest": 8 if not chosen.quick else 3,
        "bootstrap": 0,
        "samples": 128 if not chosen.quick else samples,
    }
    write_json(base.folder / "detect_settings.json", settings)
    common = {"model": chosen.teacher, "run": base.folder, "device": "cpu"}
    probe(ProbeConfig(**common))
    detect(DetectConfig(**common, **settings))
    budget = chosen.budget or (BUDGET if not chosen.quick else 300)
    context = Context(
        model=chosen.teacher,
        teacher=teacher,
        calibration=calibration,
        base=base.folder,
        budget=budget,
    )
    unseen = rendered(chosen.teacher, weights, 240 if not chosen.quick else batch, batch, seed=1)
    captions = chosen.captions or (CAPTIONS if not chosen.quick else 4)
    validation = rendered(chosen.teacher, weights, 2 * batch, batch, seed=2)
    judge = Judge(chosen.teacher, open_model(chosen.teacher), validation, unseen, captions, folder)
    return (replace(context, rates=(1e-3,)) if chosen.quick else context), judge


def run(chosen) -> dict:
    folder = Path(chosen.work)
    context, judge = prepare(chosen, folder)
    # finds every row's intervals before anything is trained
    builds = {row: row.build(context) for row in rows()}
    done = []
    for row, build in builds.items():
        if (
            row.table not in chosen.tables
            or chosen.only
            and row.folder not in chosen.only.split(",")
        ):
            continue
        done.append(measure(context, judge, row, build, folder))
        values = done[-1]
        print(
            f"\n{row.table} {row.name}: drop {values['drop_percent']:.2f} % ({values['low']:.2f}-{values['high']:.2f}), "
            f"velocity error {values['velocity_error']['value']:.4f}, {values['parameters'] / 1e6:.2f} M",
            flush=True,
        )
    done += one_training(context, judge, folder, SIZES) if "sizes" in chosen.tables else []
    tables = {
        name: [row for row in done if row["table"] == name]
        for name in TABLES
        if name in chosen.tables
    }
    about = {
        "budget": context.budget,
        "rates": context.rates,
        "teacher": describe(chosen.teacher, context.teacher.weights),
    }
    return {**tables, "ours_at_half": _half(chosen, context, judge, folder), **about}


def _half(chosen, context: Context, judge: Judge, folder: Path) -> dict | None:
    """The longer training at half of the parameters, and its score on many captions."""
    if "half" not in chosen.tables or chosen.only and "half" not in chosen.only.split(","):
        return None
    recipe = ours(context, half(context), TUNED)
    search = folder / "equal_parameters-ours_parts_only" / "search.json"
    budget = HALF_BUDGET if not chosen.quick else 2 * context.budget
    trained_longer(context, recipe, folder / "half", search, budget)
    captions = HALF_CAPTIONS if not chosen.quick else len(judge.texts)
    many = Judge(
        chosen.teacher, open_model(chosen.teacher), judge.validation, judge.unseen, captions, folder
    )
    values = half_row(context, judge, many, recipe, folder / "half")
    print(
        f"\nours at half: drop {values['drop_percent']:.2f} % ({values['low']:.2f}-{values['high']:.2f})",
        flush=True,
    )
    return values


def _tiny(path: Path) -> Path:
    if not path.exists():
        random_teacher(path, TINY, seed=0, codec=fit_codec(0, samples=16))
    return path


def show(values: dict) -> None:
    for table in [name for name in TABLES if name in values]:
        lines = [
            [
                r["name"],
                f"{r['parameters'] / 1e6:.2f}",
                f"{r['drop_percent']:.2f} ({r['low']:.2f}-{r['high']:.2f})",
                f"{100 * r['character_accuracy']:.1f}",
                f"{r['image_distance']:.3f}",
                f"{r['velocity_error']['value']:.4f}",
                f"{r['mean_of_subsets']:.4f}" if r.get("mean_of_subsets") else "-",
                f"{r.get('learning_rate', 0):g}",
            ]
            for r in values[table]
        ]
        header = [
            "row",
            "M",
            "drop %",
            "characters %",
            "image distance",
            "velocity error",
            "mean of subsets",
            "rate",
        ]
        output.print_table(table.replace("_", " "), header, lines)


def main(arguments: list[str] | None = None) -> Path:
    parser = output.options("ablation", __doc__)
    parser.add_argument(
        "--teacher", help="qwen, flux: the bundled ones; a file; a tiny random one for --quick"
    )
    parser.add_argument(
        "--work",
        type=Path,
        help="folder of the trainings (runs/ablation); a second run goes on there",
    )
    parser.add_argument("--budget", type=int, help=f"block passes of a row ({BUDGET})")
    parser.add_argument("--captions", type=int, help=f"pictures a row ({CAPTIONS})")
    parser.add_argument(
        "--tables",
        nargs="+",
        choices=(*TABLES, "half"),
        default=(*TABLES, "half"),
        help="which (all)",
    )
    parser.add_argument(
        "--only",
        help="folders of the rows to train now, comma-separated; no result file is written",
    )
    chosen = output.parse(parser, arguments)
    suffix = f"_{chosen.teacher}" if chosen.teacher in TEACHERS and chosen.teacher != "qwen" else ""
    chosen.work = chosen.work or Path(
        ("runs/ablation_quick" if chosen.quick else "runs/ablation") + suffix
    )
    name = chosen.teacher or ("" if chosen.quick else "qwen")
    if name in TEACHERS:
        chosen.teacher = bundled(name)
    else:
        chosen.teacher = Path(name) if name else _tiny(chosen.work / "teacher.safetensors")
    values = run(chosen)
    if chosen.only:
        return chosen.work
    show(values)
    titled = {name.replace("_", " "): values[name] for name in TABLES if name in values}
    with replacing(chosen.output / f"ablation{suffix}.png") as temporary:
        temporary.write_bytes(chart.ablation_chart(titled))
    return output.write(f"ablation{suffix}", chosen, values)


if __name__ == "__main__":
    main()
