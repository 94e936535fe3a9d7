"""The results of runs as pictures and short texts: errors of probes, a plan's map and curves, losses,
the state of a job."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from PIL import Image

from ...ppcl_engine.algorithms.distillation.saved_training import read_losses
from ...ppcl_engine.architectures import architecture_named
from ...ppcl_engine.data.calibration import load_calibration
from ...ppcl_engine.jobs.state import PREVIEW, JobState
from ...ppcl_engine.models.cost import CostModel
from ...ppcl_engine.plan import FULL, PruningPlan, Variant
from ...ppcl_engine.report.drawings import damage_map, layer_map, line_charts
from ...ppcl_engine.report.drawings.canvas import BLUE, INK, QUIET
from ...ppcl_engine.report.drawings.preview_sheet import LAYER_ERRORS, sheet
from ...ppcl_engine.run import Run
from ...ppcl_engine.system.atomic import read_json
from ...ppcl_engine.system.numbers import count_text
from ...ppcl_engine.system.tensor_files import TensorFile
from ..pictures import CARD, picture_of, stacked, tensor_of, text_card
from .runs import progress_text

ANY_GRID, ANY_TEXT_TOKENS = (1, 2, 2), 2  # any will do: numbers of parameters do not depend on them


def calibration_text(folder: Path) -> str:
    calibration = load_calibration(Run(folder).calibration)
    tokens = sorted({batch["hidden_states"].shape[1] for batch in calibration.batches})
    return (
        f"{calibration.samples} samples in {len(calibration)} batches, {' or '.join(f'{t:,}' for t in tokens)} image "
        f"tokens each ({folder.name})"
    )


def bits_text(report: Path) -> str:
    """What an export chose within a budget; nothing where there was none."""
    if not report.exists():
        return ""
    values = read_json(report)
    counts = ", ".join(f"{count} {store}" for store, count in values["matrices"].items())
    replaced = " ".join(values["intervals"]) or "none"
    return f"matrices: {counts}; intervals replaced: {replaced}; predicted damage {values['predicted_damage']:.4g}"


def probe_errors(folder: Path) -> dict[str, dict[int, float]]:
    """Stream -> block -> squared error on held-out samples, relative to what the block adds."""
    by_stream: dict[str, dict[int, float]] = {}
    for path in sorted(Run(folder).probes.glob("block_*.safetensors")):
        for stream, row in json.loads(TensorFile(path).metadata["report"]).items():
            errors = [
                row[name] for name in ("held_out", "held_out_trained") if row[name] is not None
            ]
            by_stream.setdefault(stream, {})[int(path.stem.removeprefix("block_"))] = min(errors)
    return by_stream


def probe_text(errors: dict[str, dict[int, float]]) -> str:
    lines = []
    for stream, row in errors.items():
        best, worst = (sorted(row, key=row.get, reverse=turned)[:3] for turned in (False, True))
        lines.append(
            f"{stream}: a linear map leaves {_share(min(row.values()))} to {_share(max(row.values()))} of a block's step; "
            f"nearest to linear: {_listed(best)}; farthest: {_listed(worst)}"
        )
    return "\n".join(lines)


def _share(value: float) -> str:
    return f"{100 * value:.2g} %"


def _listed(blocks: list[int]) -> str:
    return ", ".join(map(str, blocks))


def damage_table(folder: Path) -> torch.Tensor | None:
    """Measured damage of replacing blocks u to u + j [blocks, longest]; NaN where it was not measured;
    None before detection."""
    path = Run(folder).curves
    if not path.exists():
        return None
    curves = TensorFile(path)
    return curves.read("error").sum(-1) / curves.read("power").sum()


def curves_picture(folder: Path, plan: PruningPlan) -> torch.Tensor:
    """The alignment curve from each interval's start and its first differences; below, the damage of
    every interval."""
    if not plan.intervals:
        return text_card("The plan has no interval.", QUIET)
    drawn = [line_charts.cka_curves(plan, TensorFile(Run(folder).curves).read("cka"))]
    drawn.append(damage_map.damage_map(plan, damage_table(folder)))
    return stacked([picture_of(png) for png in drawn])


def map_picture(plan: PruningPlan) -> torch.Tensor:
    """The layer map of the named variants; before there are any, of the full model and of everything
    that the plan replaces."""
    everything = plan.everything()
    variants = list(plan.variants) or [Variant(name=FULL)] + [
        Variant(name=name, intervals=everything.intervals, sites=sites)
        for name, sites in (("depth", ()), ("depth + width", everything.sites))
        if sites or (name == "depth" and everything.intervals)
    ]
    cost = CostModel(architecture_named(plan.architecture), plan.config, ANY_GRID, ANY_TEXT_TOKENS)
    parameters = {v.name: v.parameters or cost.variant(plan, v).parameters for v in variants}
    teacher = cost.variant(plan, Variant(name=FULL)).parameters
    return picture_of(layer_map.layer_map(plan, variants, parameters, teacher))


def plan_text(plan: PruningPlan, damage: torch.Tensor | None) -> str:
    """One line for each interval, and one for all width sites: their damage, and how stable they
    are."""
    removed = sum(interval.removed for interval in plan.intervals)
    lines = [
        f"{_counted(plan.intervals, 'interval')}, {removed} of {plan.num_blocks} blocks removed"
    ]
    scores = [_damage_of(interval, damage) for interval in plan.intervals]
    for interval, score in zip(plan.intervals, scores, strict=True):
        sure = (
            ""
            if interval.stability is None
            else f", found in {100 * interval.stability:.0f} % of resamples"
        )
        lines.append(f"{interval.name}: damage {_number(score)}{sure}")
    if len(scores) > 1 and None not in scores:
        lines.append(f"damage of all of them together about {sum(scores):.3g} (they nearly add up)")
    if plan.switches:
        parts = [f"{s.name} {_number(s.score)}" for s in plan.switches]
        lines.append(f"{_counted(plan.switches, 'width site')}, damage of each: {', '.join(parts)}")
    return "\n".join(lines)


def _counted(things: tuple, name: str) -> str:
    return f"{len(things)} {name}" + ("" if len(things) == 1 else "s")


def _damage_of(interval, damage: torch.Tensor | None) -> float | None:
    """The damage measured in the search for intervals, if it was; else what the plan says."""
    if damage is not None and interval.removed < damage.shape[1]:
        value = float(damage[interval.first, interval.removed])
        if math.isfinite(value):
            return value
    return interval.score


def _number(score: float | None) -> str:
    return "not measured" if score is None else f"{score:.2g}"


def variants_text(plan: PruningPlan) -> str:
    lines = []
    for variant in plan.variants:
        error = "" if variant.damage is None else f", velocity error {variant.damage:.3g}"
        lines.append(f"{variant.name}: {count_text(variant.parameters or 0)} parameters{error}")
    return "\n".join(lines)


def losses_of(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Losses of all updates of each trained part. kind: "depth", "width" or "tuned". Of depth only
    the plan's intervals: others may have been trained for an earlier plan."""
    paths = sorted((folder / kind).glob("*.safetensors"), key=lambda path: path.stem)
    if kind == "depth":
        paths = [
            Run(folder).student(interval.name) for interval in Run(folder).load_plan().intervals
        ]
    by_part = {path.stem: read_losses(path) for path in paths if path.exists()}
    return {name: losses for name, losses in by_part.items() if len(losses)}


def losses_text(losses: dict[str, torch.Tensor]) -> str:
    """A line for each part: the mean loss of the first tenth of the updates and of the last."""
    lines = []
    for name, values in losses.items():
        tenth = max(1, len(values) // 10)
        lines.append(
            f"{name}: loss {values[:tenth].mean():.3g} -> {values[-tenth:].mean():.3g}, {len(values):,} updates"
        )
    return "\n".join(lines)


def training_picture(folder: Path, losses: dict[str, torch.Tensor]) -> torch.Tensor:
    """The job's last preview, or, if it drew none, its losses."""
    if (folder / PREVIEW).exists():
        return picture_of((folder / PREVIEW).read_bytes())
    return (
        picture_of(line_charts.loss_curves(losses))
        if losses
        else text_card("Nothing was trained.", QUIET)
    )


def sparse_report(folder: Path) -> dict:
    """The report that sparsify wrote beside its file."""
    (path,) = (folder / "exports").glob("*.json")
    return read_json(path)


def sparse_picture(report: dict) -> torch.Tensor:
    """A line for each linear map: its error in every block."""
    blocks = list(dict.fromkeys(row["block"] for row in report["layers"]))
    curves: dict[str, dict[int, float]] = {}
    for row in report["layers"]:
        curves.setdefault(row["layer"], {})[blocks.index(row["block"])] = row["error"]
    return picture_of(sheet(curves, [], *LAYER_ERRORS))


def sparse_text(report: dict) -> str:
    worst = max(report["layers"], key=lambda row: row["error"])
    lines = [
        f"{_share(report['dropped'] / report['weights'])} of {report['weights']:,} weights are zero ({report['pattern']})",
        f"error of a layer: {report['error']:.2g} on the average, {worst['error']:.2g} in {worst['layer']} of block "
        f"{worst['block']}",
    ]
    return "\n".join([*lines, *filter(None, [report["note"]])])


def state_picture(folder: Path, state: JobState) -> torch.Tensor:
    """A card that says how a job stands, above its preview where there is one."""
    card = text_card(progress_text(folder, state), INK if state.is_final else BLUE)
    if not (folder / PREVIEW).exists():
        return card
    with Image.open(folder / PREVIEW) as opened:
        preview = opened.convert("RGB")
        return stacked(
            [card, tensor_of(preview.resize((CARD, round(preview.height * CARD / preview.width))))]
        )


def report_of(folder: Path) -> str:
    """Where the comparison with the full model is; "" if there was none."""
    if not Run(folder).evaluation.exists():
        return ""
    rows = read_json(Run(folder).evaluation)["variants"]
    return f"{len(rows) - 1} variants are compared with the full model in {folder.name}/{Run(folder).report.name}"
