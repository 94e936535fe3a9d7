"""A random Qwen-Image of 20 B parameters in fp8 through every streamed stage: memory and bytes beside
what --dry-run says.

First a model of 6 blocks of the same width, then one of 60. A command that would take longer than
--limit on the large one, by the small one's time, or more disk than is free, is left to the small
one, and its row says so.
Goes on where it was stopped: rows that are done lie in the working folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from ppcl_engine.architectures.qwen_image import QwenImage
from ppcl_engine.estimate.needs import Needs, needs
from ppcl_engine.settings.arguments import parse
from ppcl_engine.stages import STAGES
from ppcl_engine.system.atomic import write_json

from ..shared import output
from ..shared.teachers import NARROW
from .model import random_embeddings, random_model
from .process import Watched, load_libraries, run
from .recipe import CAPTIONS, TEXT_TOKENS, Step, recipe

SMALL, LARGE = 6, 60  # blocks
QUICK = {
    **NARROW,
    "attention_head_dim": 32,
    "num_attention_heads": 8,
    "axes_dims_rope": [8, 12, 12],
}
WITHIN = (0.8, 1.25)  # of what the dry run says
FIGURES = ("memory", "read", "written")
SMALLEST = 1e6  # bytes; a result file of a few KB says nothing of what a stage writes


def measured(step: Step, folder: Path, fresh: bool) -> dict:
    """The figures of a process of its own (quick runs: of this one)."""
    if not fresh:
        load_libraries()
        with Watched() as watched, contextlib.redirect_stdout(io.StringIO()):
            code = run(step.arguments)
        return {**watched.figures(), "code": code}
    result = folder / "figures.json"
    command = [sys.executable, "-m", "benchmarks.full_size.process", str(result), *step.arguments]
    code = subprocess.run(command, cwd=Path(__file__).parents[2]).returncode
    return {**json.loads(result.read_text()), "code": code}


def predicted(step: Step) -> Needs | None:
    if not step.predicted:
        return None
    stage, *settings = step.arguments
    return needs(parse(STAGES[stage][0], stage, settings))


def row_of(step: Step, said: Needs | None, blocks: int, folder: Path, fresh: bool) -> dict:
    before = free(folder)
    found = measured(step, folder, fresh)
    if found.pop("code"):
        raise ValueError(f"{' '.join(step.arguments)} failed; see above")
    row = {"stage": step.name, "blocks": blocks, **found, "disk": before - free(folder)}
    if said is not None:
        row["predicted"] = asdict(said)
        row["ratio"] = {
            name: round(asdict(said)[name] / found[name], 3)
            for name in FIGURES
            if found[name] > SMALLEST
        }
    return row


def too_much(said: Needs | None, seconds: float, limit: float, folder: Path) -> str:
    """Why a command can't run here, or nothing."""
    if seconds > limit:
        return f"{seconds / 3600:.1f} hours expected"
    if said is not None and said.disk > free(folder):
        return f"{said.disk / 1e9:.0f} GB of disk expected, {free(folder) / 1e9:.0f} free"
    return ""


def free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def rows_of(blocks: int, config: dict, folder: Path, fresh: bool, short: dict, limit: float):
    """One row a command, from the file of those that are done."""
    work, done_file = folder / f"blocks_{blocks}", folder / f"rows_{blocks}.json"
    work.mkdir(parents=True, exist_ok=True)
    rows = json.loads(done_file.read_text()) if done_file.exists() else []
    model, embeddings = work / "model.safetensors", work / "embeddings.safetensors"
    if not model.exists():
        random_embeddings(embeddings, config, CAPTIONS, TEXT_TOKENS)
        random_model(model, {**config, "num_layers": blocks})
    for step in recipe(model, work / "run", embeddings, blocks)[len(rows) :]:
        step.before()
        said = predicted(step)
        expected = short[step.name]["seconds"] * blocks / SMALL if short else 0.0
        cut = too_much(said, expected, limit, work)
        if cut and not short:
            raise ValueError(f"{step.name} in {work}: {cut}")
        if cut:
            rows.append({**short[step.name], "cut": cut})
        else:
            rows.append(row_of(step, said, blocks, work, fresh))
        for name in step.leaves:
            shutil.rmtree(work / "run" / name, ignore_errors=True)
        write_json(done_file, rows)
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict) -> str:
    figures = [f"{name} {row[name] / 1e9:.2f}" for name in FIGURES]
    ratios = row.get("ratio", {})
    return f"{row['stage']}, {row['blocks']} blocks: {', '.join(figures)} GB, {row['seconds']} s; said {ratios}"


def show(rows: list[dict]) -> None:
    header = ["stage", "blocks"]
    header += [cell for name in FIGURES for cell in (f"{name} GB", "said")] + ["seconds"]
    table = []
    for row in rows:
        cells = [row["stage"], row["blocks"]]
        for name in FIGURES:
            said = row["predicted"][name] / 1e9 if "predicted" in row else None
            cells += [f"{row[name] / 1e9:.2f}", "" if said is None else f"{said:.2f}"]
        table.append([*cells, row["seconds"]])
    output.print_table("measured, and what the dry run says", header, table)


def outside(rows: list[dict]) -> list[str]:
    """Figures that are not within the goal."""
    return [
        f"{row['stage']} {name}"
        for row in rows
        for name, ratio in row.get("ratio", {}).items()
        if not WITHIN[0] <= ratio <= WITHIN[1]
    ]


def main(arguments: list[str] | None = None) -> Path:
    parser = output.options("full_size", __doc__)
    parser.add_argument("--folder", type=Path, help="where models and runs go (60 GB; on a disk)")
    parser.add_argument("--limit", type=float, default=3600, help="seconds a command may take")
    parser.add_argument("--small", action="store_true", help="the model of 6 blocks alone")
    chosen = output.parse(parser, arguments)
    folder = chosen.folder or Path("runs/full_size")
    published = QwenImage.model_configs["qwen_image"]
    config = QUICK if chosen.quick else published
    rows = rows_of(SMALL, config, folder, not chosen.quick, {}, chosen.limit)
    values = {"small": rows}
    if not (chosen.quick or chosen.small):
        short = {row["stage"]: row for row in rows}
        rows = rows_of(LARGE, config, folder, True, short, chosen.limit)
        values["large"] = rows
    show(rows)
    values |= {"config": config, "within": WITHIN, "outside": outside(rows)}
    return output.write("full_size", chosen, values)


if __name__ == "__main__":
    main()
