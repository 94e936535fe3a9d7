"""The sections on public benchmarks: the scores, and the prompts that lost most."""

from __future__ import annotations

from pathlib import Path

import torch

from ..data.benchmarks import BENCHMARKS
from ..data.photos import read_picture
from ..run import Run
from ..system.schemas import read_checked_object
from .drawings.picture_sheet import picture_sheet
from .html import NONE, Html, image, joined, table, tag
from .result_files import BenchmarkResult
from .texts import BENCHMARK_TEXT, LOST_TEXT

SIDE = 256  # pixels of the longer side of a picture in the page


def read_benchmarks(run: Run) -> dict[str, dict]:
    """Name -> result file, in the order of BENCHMARKS."""
    paths = {name: run.benchmark(name) for name in BENCHMARKS}
    return {
        name: read_checked_object(path, BenchmarkResult)
        for name, path in paths.items()
        if path.exists()
    }


def benchmark_sections(run: Run, results: dict[str, dict]) -> list[Html]:
    if not results:
        return []
    scores = tag("section", tag("h2", "Benchmarks"), tag("p", BENCHMARK_TEXT), _scores(results))
    return [scores, *(_lost(run, name, result) for name, result in results.items())]


def _scores(results: dict[str, dict]) -> Html:
    """A row for each variant, a column for each benchmark, and their mean."""
    rows = {name: {r["name"]: r for r in result["variants"]} for name, result in results.items()}
    variants = list(dict.fromkeys(name for column in rows.values() for name in column))
    heads = ["variant", *(_head(name, result) for name, result in results.items()), "mean"]
    body = []
    for variant in variants:
        found = [rows[name].get(variant) for name in results]
        whole = [row["value"] for row in found if row]
        mean = f"{100 * sum(whole) / len(whole):.1f} %" if len(whole) == len(results) else NONE
        body.append([variant, *(_cell(row) for row in found), mean])
    return table(heads, body, "stats")


def _head(name: str, result: dict) -> Html:
    about = f"{result['prompts']} of {result['available']} prompts; judged by {result['grader']}"
    return joined([f"{BENCHMARKS[name].title}-style", tag("small", about)])


def _cell(row: dict | None) -> Html:
    if row is None:
        return joined([NONE])
    score = f"{100 * row['value']:.1f} %"
    span = tag("small", f"({100 * row['low']:.1f}–{100 * row['high']:.1f})")
    return joined(
        [
            score,
            span,
            *([tag("small", _difference(row["difference"]))] if row["difference"] else []),
        ]
    )


def _difference(stat: dict) -> str:
    """ "-1.2 (-2.0 to -0.4), worse": a word only where the interval leaves 0 out."""
    low, value, high = (f"{100 * stat[name]:+.1f}" for name in ("low", "value", "high"))
    word = ", better" if stat["low"] > 0 else ", worse" if stat["high"] < 0 else ""
    return f"{value} ({low} to {high}){word}"


def _lost(run: Run, name: str, result: dict) -> Html:
    """The prompts that lost most, as pictures side by side."""
    lost, variants = result["lost_most"], [row["name"] for row in result["variants"]]
    title = tag("h2", f"{BENCHMARKS[name].title}-style: what was lost most")
    text = LOST_TEXT.format(grader=BENCHMARKS[name].grader)
    if not lost:
        return tag("section", title, tag("p", f"{text} No prompt lost anything."))
    folder = run.benchmark(name).with_suffix("")
    sheets = {
        row["name"]: torch.stack(
            [_small(folder / row["folder"] / entry["picture"]) for entry in lost]
        )
        for row in result["variants"]
    }
    sheet = picture_sheet(variants, [entry["prompt"] for entry in lost], sheets)
    heads = ["prompt", *variants]
    rows = [
        [entry["prompt"], *(f"{100 * entry['shares'][variant]:.0f} %" for variant in variants)]
        for entry in lost
    ]
    picture = tag("div", image(sheet, "the prompts that lost most", class_="wide"), class_="scroll")
    return tag("section", title, tag("p", text), picture, table(heads, rows, "prompts"))


def _small(path: Path) -> torch.Tensor:
    """uint8 [3, height, width]"""
    import numpy as np

    picture = read_picture(path)
    picture.thumbnail((SIDE, SIDE))
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)
