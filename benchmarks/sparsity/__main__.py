"""Weight pruning of the bundled teacher: every score and granularity, 30 to 70 % and 2:4, against
PPCL's variants at equal bytes.

All rows prune from the same statistics, of 240 calibration samples. layer error: mean over layers
of the relative squared error of their outputs, on samples that nothing was fitted on. velocity
error and characters read: of the whole model, on other such samples and captions. 95 % intervals:
bootstrap, of characters Wilson. Rows that are done are read from `runs/sparsity`, so an interrupted
run goes on.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ppcl_engine.algorithms.sparsity.grams import EARLY, EVEN
from ppcl_engine.algorithms.sparsity.patterns import UNSTRUCTURED, pattern_named
from ppcl_engine.algorithms.sparsity.pruning import GRANULARITIES, RECONSTRUCTION, SCORES, Method
from ppcl_engine.architectures.linear_maps import linear_maps
from ppcl_engine.data.calibration import save_calibration
from ppcl_engine.models.bundle import Bundle
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.streaming import Teacher
from ppcl_engine.settings.convert_settings import SparsifyConfig
from ppcl_engine.stages.convert.sparsify import sparsify
from ppcl_engine.system.atomic import read_json, write_json

from ..shared import output
from ..shared.pruned_demo import DEMO, SAMPLES, Context, judged, options, parse, prepare
from ..shared.pruned_layers import bytes_of, prune_model
from ..shared.scoring import mean_with_interval
from ..shared.teachers import describe
from .pictures import draw

SPARSITIES = (0.3, 0.5, 0.6, 0.7)
OTHERS = ("wanda", "ria")


@dataclass(frozen=True, kw_only=True)
class Row:
    """variant: of the demo's bundle, on its own (sparsity 0) or pruned further; like: the variant
    whose bytes the whole model is brought to."""

    score: str = ""
    granularity: str = "layer"
    pattern: str = UNSTRUCTURED
    sparsity: float = 0.5
    exchange: bool = False
    compensate: bool = False
    permute: bool = False
    timesteps: str = EVEN
    variant: str | None = None
    like: str | None = None

    @property
    def table(self) -> str:
        if self.variant or self.like:
            return "variants"
        return self.pattern if self.pattern != UNSTRUCTURED else f"{100 * self.sparsity:.0f} %"

    @property
    def name(self) -> str:
        if self.variant and not self.sparsity:
            return f"ppcl {self.variant}"
        words = [f"ppcl {self.variant}, {100 * self.sparsity:.0f} %"] if self.variant else []
        words += (
            [f"whole, as many bytes as {self.like} ({100 * self.sparsity:.1f} %),"]
            if self.like
            else []
        )
        words += (
            [self.score] if self.pattern != UNSTRUCTURED else [f"{self.score} {self.granularity}"]
        )
        more = {
            "permute": self.permute,
            "exchange": self.exchange,
            "compensate": self.compensate,
            self.timesteps: self.timesteps != EVEN,
        }
        return " ".join([*words, *("+ " + name for name, on in more.items() if on)])

    @property
    def file(self) -> str:
        return (
            f"{self.table}-{self.name}.json".replace(" ", "_")
            .replace("%", "percent")
            .replace(":", "of")
            .replace(",", "")
        )

    @property
    def method(self) -> Method:
        return Method(
            pattern=pattern_named(self.pattern),
            sparsity=self.sparsity,
            score=self.score,
            granularity=self.granularity,
            exchange=self.exchange,
            compensate=self.compensate,
        )


BEST = {
    "score": "energy",
    "granularity": "cluster",
    "exchange": True,
    "compensate": True,
}  # `ppcl sparsify`'s own settings


def rows(sparsities: Sequence[float]) -> list[Row]:
    found = []
    for sparsity in sparsities:
        found += [
            Row(score=s, granularity=g, sparsity=sparsity)
            for s, g in itertools.product(SCORES, GRANULARITIES)
        ]
        found.append(Row(score="obs", sparsity=sparsity, timesteps=EARLY))
        found.append(Row(score="wanda", granularity="row", exchange=True, sparsity=sparsity))
        found.append(Row(score="energy", granularity="cluster", exchange=True, sparsity=sparsity))
        found.append(Row(sparsity=sparsity, **BEST))
    found += [Row(score=s, pattern="2:4") for s in SCORES]
    found += [
        Row(score="energy", pattern="2:4", permute=True),
        Row(score="obs", pattern="2:4", timesteps=EARLY),
    ]
    return found + [Row(**BEST, pattern="2:4"), Row(**BEST, pattern="2:4", permute=True)]


def variant_rows(teacher: Teacher) -> list[Row]:
    """PPCL's variants, the whole model at the bytes of each, and each made sparse itself; none for
    another teacher."""
    plan = Bundle(DEMO).plan
    if plan.fingerprint != teacher.weights.fingerprint:
        return []
    every = sum(math.prod(teacher.weights.shape(key)) for key in teacher.weights.keys())
    pruned = sum(
        m.weight.numel()
        for _, block in teacher.walk(0, teacher.num_blocks - 1)
        for m in linear_maps(block).values()
    )
    found = [Row(variant=variant.name, sparsity=0.0) for variant in plan.variants]
    for variant in plan.variants:
        if variant.intervals:
            sparsity = (2 * every + pruned / 8 - 2 * variant.parameters) / (2 * pruned)
            found += [
                Row(like=variant.name, sparsity=sparsity, **BEST),
                Row(variant=variant.name, sparsity=0.3, **BEST),
            ]
    return found


def measure(context: Context, row: Row) -> dict:
    """Prunes and scores one row, or reads what an earlier run left."""
    path = context.folder / f"rows_{len(context.judge.texts)}" / row.file
    if path.exists():
        return read_json(path)
    start = time.monotonic()
    model, values = _variant(context, row) if row.variant else _pruned(context, row)
    values |= judged(context, model, row.name)
    write_json(
        path, {"table": row.table, "name": row.name, **values, "seconds": time.monotonic() - start}
    )
    return read_json(path)


def _pruned(context: Context, row: Row) -> tuple[nn.Module, dict]:
    grams = context.grams
    found = prune_model(
        context.teacher, grams[row.timesteps], grams["unseen"], row.method, row.permute
    )
    errors = found.errors if found.unseen_errors is None else found.unseen_errors
    return found.model, {
        "bytes": found.bytes,
        "layer_error": mean_with_interval(errors),
        "layer_rows": errors,
        "calibration_layer_error": mean_with_interval(found.errors),
    }


def _variant(context: Context, row: Row) -> tuple[nn.Module, dict]:
    if not row.sparsity:
        model = open_model(DEMO, row.variant, context.path)
        return model, {"bytes": bytes_of(model, [], UNSTRUCTURED)}
    calibration = context.folder / "calibration.safetensors"
    save_calibration(calibration, context.calibration)
    path = sparsify(
        SparsifyConfig(
            path=DEMO,
            base=context.path,
            variant=row.variant,
            calibration=calibration,
            run=context.folder,
            score=row.score,
            granularity=row.granularity,
            sparsity=row.sparsity,
            exchange=row.exchange,
            compensate=row.compensate,
            name=f"sparse_{row.variant}",
            device="cpu",
        )
    )
    model = open_model(path)
    return model, {
        "bytes": bytes_of(model, read_json(path.with_suffix(".json"))["layers"], row.pattern)
    }


def comparisons(done: dict[tuple[str, str], dict]) -> list[dict]:
    """Ours against Wanda and RIA in every granularity (as published: row), and with compensation
    against SparseGPT: differences of the same layers and the same samples, negative where ours is
    better."""
    found = []
    for (table, name), ours in done.items():
        if name.startswith("energy cluster") and "%" in table:
            rivals = [f"{other} {granularity}" for other in OTHERS for granularity in GRANULARITIES]
            rivals += ["obs layer"] if "compensate" in name else []
            found += [
                _difference(table, ours, done[table, rival])
                for rival in rivals
                if (table, rival) in done
            ]
    return found


def _difference(table: str, ours: dict, theirs: dict) -> dict:
    values = {"table": table, "ours": ours["name"], "theirs": theirs["name"]}
    for measure_name in ("layer", "velocity"):
        pairs = zip(ours[f"{measure_name}_rows"], theirs[f"{measure_name}_rows"], strict=True)
        values[measure_name] = mean_with_interval([a - b for a, b in pairs])
    values["better"] = all(values[name]["high"] < 0 for name in ("layer", "velocity"))
    return values


def run(chosen) -> dict:
    context = prepare(chosen)
    wanted = rows((0.5,) if chosen.quick else SPARSITIES) + variant_rows(context.teacher)
    if chosen.only:
        wanted = [row for row in wanted if row.table in chosen.only.split(",")]
    if chosen.rows:
        wanted = [row for row in wanted if row.name in chosen.rows.split(";")]
    done = {}
    for row in wanted:
        done[row.table, row.name] = values = measure(context, row)
        print(
            f"\n{row.table} {row.name}: velocity error {values['velocity_error']['value']:.4f}, characters "
            f"{100 * values['characters']['value']:.1f} %, {values['seconds']:.0f} s",
            flush=True,
        )
    compared = comparisons(done)
    tables: dict[str, list[dict]] = {}
    for (table, _), values in done.items():
        shown = {
            key: value
            for key, value in values.items()
            if key not in ("layer_rows", "velocity_rows", "table")
        }
        tables.setdefault(table, []).append(shown)
    return {
        "tables": tables,
        "comparisons": compared,
        "note": f"energy: {RECONSTRUCTION}",
        "samples": SAMPLES,
        "dense_bytes": 2 * sum(p.numel() for p in open_model(context.path).parameters()),
        "teacher": describe(context.path, context.teacher.weights),
    }


def show(values: dict) -> None:
    header = ("method", "MB", "layer error", "velocity error", "drop %", "characters %")
    for table, found in values["tables"].items():
        lines = []
        for row in found:
            cells = [
                _cell(row.get("layer_error"), 1),
                _cell(row["velocity_error"], 1),
                _cell(row["drop"], 1, 1),
            ]
            lines.append(
                (row["name"], f"{row['bytes'] / 1e6:.2f}", *cells, _cell(row["characters"], 100, 1))
            )
        output.print_table(table, header, lines)
    lines = [
        (
            f"{c['table']} {c['ours']} - {c['theirs']}",
            _cell(c["layer"], 1),
            _cell(c["velocity"], 1),
            c["better"],
        )
        for c in values["comparisons"]
    ]
    output.print_table(
        "differences", ("ours - theirs", "layer error", "velocity error", "better on both"), lines
    )


def _cell(value: dict | None, scale: float, digits: int = 4) -> str:
    if value is None:
        return "-"
    middle, low, high = (f"{scale * value[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{middle} ({low} - {high})"


def main(arguments: list[str] | None = None) -> Path:
    parser = options("sparsity", __doc__)
    parser.add_argument("--only", default="", help="tables, as '50 %%,2:4,variants'")
    parser.add_argument("--rows", default="", help="rows of these, as 'wanda row;energy cluster'")
    chosen = parse(parser, arguments)
    values = run(chosen)
    show(values)
    draw(values, chosen.output / "sparsity.png")
    return output.write("sparsity", chosen, values)


if __name__ == "__main__":
    main()
