"""What a detected plan would look like at worst: its sizes with students in closed form, and the
damage of every number of blocks. From files alone, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..algorithms.detection.closed_forms import ClosedForms, closed_forms
from ..algorithms.detection.intervals import least_damages
from ..data.calibration import load_calibration
from ..models.cost import CostModel
from ..models.streaming import StateStore, Teacher, room_for_states
from ..models.weights import Weights
from ..plan import FULL, PruningPlan, Variant
from ..run import Run
from ..settings.prune_settings import DetectConfig
from ..stages.prune.variants import SHARES, subset
from ..system.machine import DTYPES, resolve_device
from ..system.tensor_files import TensorFile

LEAST = "least damage"
AXES = ("blocks removed", "damage of the velocity, untrained")


@dataclass(frozen=True)
class UntrainedSizes:
    """The named sizes of a plan that was just detected."""

    plan: PruningPlan
    """its students in closed form"""
    students: ClosedForms
    variants: tuple[Variant, ...]

    def label(self, variant: Variant) -> str:
        removed = sum(self.plan.interval(name).removed for name in variant.intervals)
        return f"{variant.name},\nuntrained:\n-{removed} blocks"


def untrained_sizes(
    config: DetectConfig, weights: Weights, passed: Callable[[], None]
) -> UntrainedSizes | None:
    """None for a plan without intervals. Calls passed() at every block of the sweep."""
    run, device = Run(config.run), resolve_device(config.device)
    plan = run.load_plan()
    if not plan.intervals:
        return None
    plan = plan.with_parts(
        sites=(),
        variants=(),
        intervals=tuple(replace(i, correction="affine") for i in plan.intervals),
    )
    calibration = load_calibration(run.calibration)
    batches = max(2, round(config.samples / calibration.samples * len(calibration)))
    inputs = calibration.all_inputs()[:batches]
    teacher = Teacher(weights, DTYPES[config.dtype], device, config.streamed)
    store = StateStore(
        run.states / "untrained" if config.streamed else None, room=room_for_states()
    )
    students = closed_forms(teacher, inputs, plan.intervals, store, passed)
    cost = CostModel.at(weights.architecture, weights.config, inputs[0])
    return UntrainedSizes(plan, students, _sizes(plan, cost))


def _sizes(plan: PruningPlan, cost: CostModel) -> tuple[Variant, ...]:
    """As the stage `variants` will choose them; each set of intervals once."""
    full, least = (
        cost.variant(plan, v).parameters for v in (Variant(name=FULL), plan.everything())
    )
    chosen = {name: subset(cost, plan, (full - least) * share) for name, share in SHARES.items()}
    last = {intervals: name for name, intervals in chosen.items()}
    return tuple(
        Variant(name=name, intervals=intervals)
        for name, intervals in chosen.items()
        if intervals and last[intervals] == name
    )


def damage_curve(config: DetectConfig, run: Run) -> dict[int, float]:
    """Blocks removed -> the damage of the best intervals that remove so many. Damages nearly add up."""
    curves = TensorFile(run.curves)
    damage = (curves.read("error").sum(-1) / curves.read("power").sum()).tolist()
    protect = frozenset(map(int, config.protect.replace(",", " ").split()))

    def cost(u: int, v: int) -> float:
        value = damage[u][v - u]
        return math.inf if math.isnan(value) else value  # no interval goes from u to v

    totals = least_damages(cost, len(damage), len(damage[0]), len(damage) - 1, protect)
    return {removed: total for removed, total in enumerate(totals) if 0 < total < math.inf}
