"""What switching costs: subsets of a row's intervals, and the smaller sizes of one training without
retraining."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import nn

from ppcl_engine.algorithms.detection.damage import Damage
from ppcl_engine.algorithms.detection.intervals import least_damage
from ppcl_engine.models.assembly import open_variant
from ppcl_engine.models.cost import CostModel
from ppcl_engine.models.streaming import run_chain
from ppcl_engine.models.surgery import PassThrough
from ppcl_engine.plan import PruningPlan, Variant
from ppcl_engine.run import Run
from ppcl_engine.stages.run_students import RunStudents
from ppcl_engine.system.atomic import read_json, write_json

from ..shared.scoring import Judge
from .rows import Context

SWITCHED = ("+ linear probes", "+ non-sequential", "ours, parts only")
SUBSETS = 24
ONE_TRAINING = "sizes-one_training_small"


def subsets(context: Context, judge: Judge, name: str, model: nn.Module, run: Path) -> dict:
    """Mean velocity error over single parts and random subsets; {} for rows that do not switch."""
    if name not in SWITCHED:
        return {}
    errors = (
        _of_plan(context, judge, Run(run))
        if name.startswith("ours")
        else _of_intervals(context, judge, model)
    )
    return {
        "mean_of_singles": _mean(errors["singles"]),
        "mean_of_subsets": _mean(errors["subsets"]),
    }


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def drawn_subsets(parts: list, seed: int) -> list[tuple]:
    """Random sets of at least two parts, none the whole: [SUBSETS]."""
    draw = random.Random(seed)
    sizes = [draw.randint(2, max(2, len(parts) - 1)) for _ in range(SUBSETS)]
    return [tuple(draw.sample(parts, min(size, len(parts)))) for size in sizes]


def _of_intervals(context: Context, judge: Judge, model: nn.Module) -> dict[str, list[float]]:
    """The velocity errors of one interval each, and of random subsets of them, in a model whose kept
    blocks are the teacher's, or students before a gap."""
    teacher = context.teacher
    prefixes = (
        teacher.architecture.block_prefix(teacher.config, index)
        for index in range(teacher.num_blocks)
    )
    blocks = [model.get_submodule(prefix.rstrip(".")) for prefix in prefixes]
    gaps = [index for index, block in enumerate(blocks) if isinstance(block, PassThrough)]
    starts = {index: next(u for u in range(index, -1, -1) if u not in gaps) for index in gaps}
    intervals = sorted(set(starts.values()))

    def error(on: tuple[int, ...]) -> float:
        inside = {g: u for g, u in starts.items() if u in on}
        chain = [
            blocks[i] if i in on else teacher.block(i)
            for i in range(teacher.num_blocks)
            if i not in inside
        ]
        above = below = 0.0
        with torch.no_grad():
            for inputs, target in zip(
                judge.unseen.all_inputs(), judge.target_batches(), strict=True
            ):
                ours = run_chain(
                    teacher.architecture, teacher.outer, chain, teacher.embed(inputs)
                ).double()
                above, below = (
                    above + float((ours - target).square().sum()),
                    below + float(target.square().sum()),
                )
        return above / below

    return {
        "singles": [error((u,)) for u in intervals],
        "subsets": [error(chosen) for chosen in drawn_subsets(intervals, context.seed)],
    }


def _of_plan(context: Context, judge: Judge, run: Run) -> dict[str, list[float]]:
    plan = run.load_plan()
    damage = _damage(context, judge, run, plan)
    everything = plan.everything()
    parts = [*everything.intervals, *everything.sites]

    def error(on: tuple[str, ...]) -> float:
        return damage.of(_variant(on))

    with torch.no_grad():
        return {
            "singles": [error((name,)) for name in parts],
            "subsets": [error(chosen) for chosen in drawn_subsets(parts, context.seed)],
        }


def _variant(names: tuple[str, ...], name: str = "x") -> Variant:
    intervals, sites = (tuple(n for n in names if (":" in n) == site) for site in (False, True))
    return Variant(name=name, intervals=intervals, sites=sites)


def _damage(context: Context, judge: Judge, run: Run, plan: PruningPlan) -> Damage:
    students = RunStudents(run, context.teacher.config, context.teacher.architecture)
    return Damage(context.teacher, students, plan, judge.unseen.all_inputs()[:2])


def one_training(
    context: Context, judge: Judge, folder: Path, sizes: dict[str, float]
) -> list[tuple[dict, Path]]:
    """The sizes above the smallest, as subsets of its parts, and what was read of their pictures:
    nothing is trained."""
    run = Run(folder / ONE_TRAINING / "run")
    if not run.plan.exists():
        return []
    rows, largest_first = [], sorted(sizes.items(), key=lambda item: -item[1])[:-1]
    for size, share in largest_first:
        name, path = f"one training {size}", folder / ONE_TRAINING / f"{size}.json"
        if not (path.exists() and path.with_suffix(".safetensors").exists()):
            variant = within(context, judge, run, share, name)
            plan, teacher = run.load_plan(), context.teacher
            students = RunStudents(run, teacher.config, teacher.architecture)
            model = open_variant(
                teacher.weights, students, plan, variant, teacher.dtype, teacher.device
            )
            score = judge.score(model, name, path.with_suffix(".safetensors"))
            write_json(path, {"name": name, "table": "sizes", **score, "passes": 0})
        rows.append((read_json(path), path.with_suffix(".safetensors")))
    return rows


def within(context: Context, judge: Judge, run: Run, share: float, name: str) -> Variant:
    """The subset of at most this share of the parameters whose parts do the least damage one by
    one."""
    plan = run.load_plan()
    inputs = context.calibration.inputs(0)
    grid = tuple(inputs["grid"][0].tolist())
    cost = CostModel(
        context.teacher.architecture, plan.config, grid, inputs["encoder_hidden_states"].shape[1]
    )
    everything = plan.everything()
    names = [*everything.intervals, *everything.sites]
    full, least = (cost.variant(plan, v).parameters for v in (Variant(name="full"), everything))
    damage = _damage(context, judge, run, plan)
    with torch.no_grad():
        items = [
            (full - cost.variant(plan, _variant((n,))).parameters, damage.of(_variant((n,))))
            for n in names
        ]
    wanted = full * (1 - share)
    while True:
        chosen = least_damage([(float(s), d) for s, d in items], wanted)
        if chosen is None:
            return Variant(name=name, intervals=everything.intervals, sites=everything.sites)
        variant = _variant(tuple(names[i] for i in chosen), name)
        surplus = cost.variant(plan, variant).parameters - full * share
        if surplus <= 0 or full - wanted <= least:
            return variant
        wanted += surplus  # a site went off with its interval: save so much elsewhere
