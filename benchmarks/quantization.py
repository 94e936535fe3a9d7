"""What pruning does to quantisation: fp8, int8 and int4 (simulated, weights alone) on the bundled
teacher, full and pruned.

Each variant against the teacher and against itself without quantisation, on samples that nothing
was fitted on; 95 %
intervals: bootstrap, of characters Wilson. Rows that are done are read from `runs/sparsity`, so an
interrupted run goes on.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import nn

from ppcl_engine.algorithms.distillation.quantization import BITS, NONE
from ppcl_engine.models.bundle import Bundle
from ppcl_engine.models.opening import open_model
from ppcl_engine.system.atomic import read_json, write_json

from .shared import output
from .shared.pruned_demo import DEMO, Context, judged, options, parse, prepare, quantised
from .shared.pruned_layers import prune_model
from .shared.teachers import describe
from .sparsity.__main__ import BEST, Row

KINDS = (NONE, *BITS)


def models(context: Context) -> dict[str, Callable[[], nn.Module]]:
    """A new one each time, by name: the full one, one pruned in depth, one in depth and width, one
    of which half of the weights are zero; of another teacher than the demo's the first and the
    last."""
    bundled = Bundle(DEMO).plan.fingerprint == context.teacher.weights.fingerprint
    pruned = {"depth (small)": "small", "depth and width (smallest)": "smallest"} if bundled else {}
    opened = {
        name: lambda variant=variant: open_model(DEMO, variant, context.path)
        for name, variant in pruned.items()
    }

    @cache
    def sparse() -> nn.Module:
        grams = context.grams
        return prune_model(
            context.teacher, grams["even"], grams["unseen"], Row(**BEST).method
        ).model

    return {
        "full": lambda: open_model(context.path),
        **opened,
        "weights (50 %)": lambda: copy.deepcopy(sparse()),
    }


@torch.no_grad()
def run(chosen) -> dict:
    context, rows = prepare(chosen), []
    folder = context.folder / f"quantised_{len(context.judge.texts)}"
    for name, make in models(context).items():
        for kind in KINDS:
            path = folder / f"{name.replace(' ', '_').replace('%', 'percent')}_{kind}.json"
            if not path.exists():
                start = time.monotonic()
                values = judged(context, quantised(make(), kind), f"{name} {kind}")
                write_json(
                    path,
                    {"name": name, "kind": kind, **values, "seconds": time.monotonic() - start},
                )
            rows.append(read_json(path))
            print(
                f"\n{name} {kind}: velocity error {rows[-1]['velocity_error']['value']:.4f}",
                flush=True,
            )
    for row in rows:
        del row["velocity_rows"]
    return {"rows": rows, "teacher": describe(context.path, context.teacher.weights)}


def show(values: dict) -> None:
    plain = {
        row["name"]: row["velocity_error"]["value"] for row in values["rows"] if row["kind"] == NONE
    }
    lines = []
    for row in values["rows"]:
        error, characters = row["velocity_error"], row["characters"]
        cells = [
            f"{error['value']:.4f} ({error['low']:.4f} - {error['high']:.4f})",
            f"{error['value'] - plain[row['name']]:+.4f}",
        ]
        shares = [f"{100 * characters[key]:.1f}" for key in ("value", "low", "high")]
        lines.append(
            (f"{row['name']}, {row['kind']}", *cells, f"{shares[0]} ({shares[1]} - {shares[2]})")
        )
    output.print_table(
        "quantisation", ("model", "velocity error", "more than without", "characters %"), lines
    )


def main(arguments: list[str] | None = None) -> Path:
    chosen = parse(options("quantization", __doc__), arguments)
    values = run(chosen)
    show(values)
    return output.write("quantization", chosen, values)


if __name__ == "__main__":
    main()
