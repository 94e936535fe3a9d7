"""Half of the parameters, trained longer: what is left of the teacher when time is not the limit of
the comparison."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from ppcl_engine.models.assembly import open_variant
from ppcl_engine.stages.run_students import RunStudents
from ppcl_engine.system.atomic import read_json, write_json

from ..shared.scoring import Judge
from .rows import RATES, Context, Recipe, prepared, recipe_row

SHARES = {"depth": 0.15, "width": 0.05, "polish": 0.35, "finetune": 0.45}


def trained_longer(
    context: Context, recipe: Recipe, folder: Path, search: Path, budget: int
) -> None:
    """Trains in `folder`, going on from what is there, at the learning rate that `search` found
    best."""
    errors = read_json(search) if search.exists() else {str(RATES[-1]): 0.0}
    rate = float(min(errors, key=lambda name: errors[name]))
    if not (folder / "done.json").exists():
        recipe_row(replace(recipe, shares=SHARES))(context, budget, rate, folder / "run")
        write_json(folder / "done.json", {"learning_rate": rate, "passes": budget})


def half_row(context: Context, judge: Judge, many: Judge, recipe: Recipe, folder: Path) -> dict:
    """Scores the fine-tuned variant with `many` captions, and the polished parts, which still
    switch, with `judge`."""
    path, start = folder / "row.json", time.monotonic()
    if path.exists():
        return read_json(path)
    teacher, run = context.teacher, prepared(context, recipe, folder / "run")
    plan, students = run.load_plan(), RunStudents(run, teacher.config, teacher.architecture)
    scores = {}
    for name, variant, by in (
        ("parts", plan.everything(), judge),
        ("tuned", plan.variant("tuned"), many),
    ):
        model = open_variant(
            teacher.weights, students, plan, variant, teacher.dtype, teacher.device
        )
        scores[name] = by.score(model, f"half, {name}")
    values = {
        "name": "ours at half",
        **scores["tuned"],
        "parts": scores["parts"],
        **read_json(folder / "done.json"),
    }
    write_json(path, {**values, "scoring_seconds": time.monotonic() - start})
    return read_json(path)
