"""How every row of the ablation is trained: PPCL by recipe, baselines by name, all within a budget
of block passes."""

from __future__ import annotations

import importlib
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from ppcl_engine.algorithms.distillation.round_cache import REUSE
from ppcl_engine.data.calibration import CalibrationSet
from ppcl_engine.models.assembly import open_variant
from ppcl_engine.models.streaming import Teacher
from ppcl_engine.plan import Interval, PruningPlan, parse_intervals, plan_from_json
from ppcl_engine.run import Run
from ppcl_engine.settings.prune_settings import (
    DetectConfig,
    DetectWidthConfig,
    DistillDepthConfig,
    DistillWidthConfig,
    FinetuneConfig,
    PolishConfig,
)
from ppcl_engine.stages.prune.detect import detect
from ppcl_engine.stages.prune.detect_width import detect_width
from ppcl_engine.stages.prune.distill_depth import distill_depth
from ppcl_engine.stages.prune.distill_width import distill_width
from ppcl_engine.stages.prune.finetune import finetune
from ppcl_engine.stages.prune.polish import polish
from ppcl_engine.stages.run_students import RunStudents
from ppcl_engine.system.atomic import read_json, write_json, write_text

from ..baselines import BASELINES, Task, model_of
from ..baselines.chain import Budget
from ..baselines.cka_sequential import train_sequential

RATES = (1e-3, 3e-3, 1e-2)
RATE_OF = {"depth": 1.0, "width": 0.3, "polish": 0.3}  # of a row's learning rate
UPDATES = 20
PAPER = {"init": "first", "correction": "none", "loss": "direction"}
OURS = {"init": "first", "correction": "affine", "loss": "mse"}


@dataclass(frozen=True, kw_only=True)
class Context:
    """What all rows share. budget: block passes of a row, its learning-rate search included."""

    model: Path
    teacher: Teacher
    calibration: CalibrationSet
    base: Path
    """a run folder with calibration, probes and curves"""
    budget: int
    rates: tuple[float, ...] = RATES
    seed: int = 0

    @property
    def common(self) -> dict:
        return {"model": self.model, "device": "cpu", "seed": self.seed}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """PPCL's stages and the share of the budget that each gets. width: settings of detect-width;
    finetune_rate: of the row's learning rate."""

    intervals: str
    depth: dict = field(default_factory=lambda: OURS)
    width: dict | None = None
    shares: dict[str, float]
    finetune_rate: float = 0.1


Build = Callable[[Context, int, float, Path], nn.Module]
"""(context, block passes, learning rate, folder to work in) -> a trained model"""


def recipe_row(recipe: Recipe) -> Build:
    def build(context: Context, passes: int, rate: float, folder: Path) -> nn.Module:
        run = prepared(context, recipe, folder)
        spent = {name: int(passes * share) for name, share in recipe.shares.items()}
        _depth(context, recipe, run, spent["depth"], rate)
        if recipe.width:
            _find_sites(context, recipe, run)
            _width(context, run, spent["width"], rate)
        plan = run.load_plan()
        if spent.get("polish"):
            steps = max(1, spent["polish"] // _chain_cost(plan))
            polish(
                PolishConfig(
                    **context.common,
                    run=run.folder,
                    steps=steps,
                    ema=0.0,
                    learning_rate=rate * RATE_OF["polish"],
                )
            )
        if spent.get("finetune"):
            return _finetuned(context, run, spent["finetune"], rate * recipe.finetune_rate)
        return opened(context, run)

    return build


def prepared(context: Context, recipe: Recipe, folder: Path) -> Run:
    """A run folder with the calibration and a plan of the recipe's intervals."""
    run = Run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not run.plan.exists():
        (folder / run.calibration.name).symlink_to(Run(context.base).calibration.resolve())
        plan = Run(context.base).load_plan()
        plan = plan.with_parts(intervals=parse_intervals(recipe.intervals), variants=(), sites=())
        write_text(run.plan, plan.to_json())
    return run


def opened(context: Context, run: Run) -> nn.Module:
    """The run's model with everything on."""
    teacher, plan = context.teacher, run.load_plan()
    students = RunStudents(run, teacher.config, teacher.architecture)
    return open_variant(
        teacher.weights, students, plan, plan.everything(), teacher.dtype, teacher.device
    )


def _depth(context: Context, recipe: Recipe, run: Run, passes: int, rate: float) -> None:
    plan = run.load_plan()
    last = max(i.last for i in plan.intervals) + 1
    cost = 3 * UPDATES * len(plan.intervals) + math.ceil(UPDATES / REUSE) * last
    settings = {
        **context.common,
        "run": run.folder,
        "rounds": max(1, passes // cost),
        "updates": UPDATES,
    }
    distill_depth(
        DistillDepthConfig(**settings, **recipe.depth, learning_rate=rate * RATE_OF["depth"])
    )


def _find_sites(context: Context, recipe: Recipe, run: Run) -> None:
    """Once a row: every learning rate of its search gets the same sites."""
    kept = run.folder.parent / "sites.json"
    if not kept.exists():
        detect_width(DetectWidthConfig(**context.common, run=run.folder, **recipe.width))
        write_text(kept, run.load_plan().to_json())
    sites = plan_from_json(kept.read_text(encoding="utf-8"), kept).sites
    write_text(run.plan, run.load_plan().with_parts(sites=sites, variants=()).to_json())


def _width(context: Context, run: Run, passes: int, rate: float) -> None:
    """The ridge's own sweep is counted; what is left trains."""
    sites, blocks = run.load_plan().sites, context.teacher.num_blocks
    start = (blocks + len(sites)) * len(context.calibration)
    cost = 4 * UPDATES * len(sites) + math.ceil(UPDATES / REUSE) * blocks
    settings = {
        **context.common,
        "run": run.folder,
        "rounds": max(0, (passes - start) // cost),
        "updates": UPDATES,
    }
    distill_width(
        DistillWidthConfig(**settings, give_back=False, learning_rate=rate * RATE_OF["width"])
    )


def _chain_cost(plan: PruningPlan) -> int:
    """Teacher forward, and forward and backward of the pruned chain."""
    return plan.num_blocks + 3 * (plan.num_blocks - sum(i.removed for i in plan.intervals))


def _finetuned(context: Context, run: Run, passes: int, rate: float) -> nn.Module:
    plan, teacher = run.load_plan(), context.teacher
    everything = ",".join([*plan.everything().intervals, *plan.everything().sites])
    steps = max(1, passes // _chain_cost(plan))
    finetune(
        FinetuneConfig(
            **context.common,
            run=run.folder,
            variant=everything,
            name="tuned",
            steps=steps,
            ema=0.0,
            learning_rate=rate,
        )
    )
    plan, students = run.load_plan(), RunStudents(run, teacher.config, teacher.architecture)
    return open_variant(
        teacher.weights, students, plan, plan.variant("tuned"), teacher.dtype, teacher.device
    )


def baseline_row(name: str, remove: int) -> Build:
    """Its selection is made once and kept; TinyFusion's is training, so the final training pays for
    it."""

    def build(context: Context, passes: int, rate: float, folder: Path) -> nn.Module:
        task = _task(context, remove, rate)
        removed, spent = selected(context, name, remove)
        pays = name == "tinyfusion" and passes > context.budget // 4
        pruned = BASELINES[name](task, Budget(passes - spent if pays else passes), removed)
        return model_of(
            context.teacher.architecture, context.teacher.config, pruned, context.teacher.num_blocks
        )

    return build


def sequential_row(intervals: str) -> Build:
    """Students chained end to end on intervals that were found elsewhere."""

    def build(context: Context, passes: int, rate: float, folder: Path) -> nn.Module:
        pairs = [(i.first, i.last) for i in parse_intervals(intervals)]
        removed = sum(v - u for u, v in pairs)
        pruned = train_sequential(_task(context, removed, rate), Budget(passes), pairs)
        return model_of(
            context.teacher.architecture, context.teacher.config, pruned, context.teacher.num_blocks
        )

    return build


def _task(context: Context, remove: int, rate: float) -> Task:
    return Task(
        teacher=context.teacher,
        calibration=context.calibration,
        remove=remove,
        learning_rate=rate,
        seed=context.seed,
    )


def selected(context: Context, name: str, remove: int) -> tuple[tuple[int, ...], int]:
    """(removed blocks, block passes of the selection), from `selection.json` when it is there."""
    path = context.base / "selection.json"
    known = read_json(path) if path.exists() else {}
    key = f"{name} {remove}"
    if key not in known:
        module = importlib.import_module(f"benchmarks.baselines.{name}")
        rate = context.rates[len(context.rates) // 2]
        budget = Budget(context.budget // 6 if name == "tinyfusion" else 10**12)
        options = {"share": 1.0} if name == "tinyfusion" else {}
        removed = module.select(_task(context, remove, rate), budget, **options)
        known[key] = {"removed": list(removed), "passes": budget.spent}
        write_json(path, known)
    return tuple(known[key]["removed"]), known[key]["passes"]


def intervals(context: Context, method: str, remove: int) -> str:
    """The intervals that the paper's greedy rule ("ppcl") or the dynamic programme ("budget") chooses;
    found once, then read from `intervals.json`."""
    path, key = context.base / "intervals.json", f"{method} {remove}"
    known = read_json(path) if path.exists() else {}
    if key not in known:
        known[key] = (_greedy if method == "ppcl" else _budget)(context, remove)
        write_json(path, known)
    return known[key]


def _greedy(context: Context, remove: int) -> str:
    """The paper's rule with the thresholds at which it removes just `remove` blocks, or a few more
    and the ends with the largest damage given back."""
    best: tuple[Interval, ...] | None = None
    for max_drop in (0.25, 0.5, 1.0, 0.15):
        for eps in (0.02, 0.0, 0.05, 0.1, 0.2, 0.4):
            settings = {
                **context.common,
                "run": context.base,
                **read_json(context.base / "detect_settings.json"),
            }
            detect(DetectConfig(**settings, method="ppcl", eps=eps, max_drop=max_drop))
            found = Run(context.base).load_plan().intervals
            removed = sum(i.removed for i in found)
            if removed >= remove and (best is None or removed < sum(i.removed for i in best)):
                best = found
    if best is None:
        raise ValueError(
            f"the greedy rule finds no {remove} blocks at any threshold; lower the share"
        )
    return _trimmed(list(best), sum(i.removed for i in best) - remove)


def _trimmed(intervals: list[Interval], surplus: int) -> str:
    for _ in range(surplus):
        worst = max(intervals, key=lambda i: i.score or 0.0)
        intervals.remove(worst)
        if worst.removed > 1:
            share = (worst.score or 0.0) * (worst.removed - 1) / worst.removed
            intervals.append(replace(worst, last=worst.last - 1, score=share))
    return " ".join(i.name for i in sorted(intervals, key=lambda i: i.first))


def _budget(context: Context, remove: int) -> str:
    """The dynamic programme on measured end damage."""
    settings = {
        **context.common,
        "run": context.base,
        **read_json(context.base / "detect_settings.json"),
    }
    detect(DetectConfig(**settings, method="budget", remove=remove))
    return " ".join(i.name for i in Run(context.base).load_plan().intervals)


def trained(
    context: Context, build: Build, folder: Path, error: Callable[[nn.Module], float]
) -> tuple[nn.Module, dict]:
    """Half the budget on the learning-rate search, in equal parts, half on the training with the
    best of them.

    Every finished rate is kept in `search.json`, so an interrupted row goes on.
    """
    path = folder / "search.json"
    folder.mkdir(parents=True, exist_ok=True)
    errors: dict[str, float] = read_json(path) if path.exists() else {}
    half = context.budget // 2
    for rate in context.rates:
        if str(rate) not in errors:
            place = folder / f"rate_{rate}"
            errors[str(rate)] = error(build(context, half // len(context.rates), rate, place))
            write_json(path, errors)
            shutil.rmtree(place, ignore_errors=True)
    best = min(errors, key=lambda rate: errors[rate])
    model = build(context, half, float(best), folder / "run")
    return model, {"learning_rate": float(best), "search": errors, "passes": context.budget}
