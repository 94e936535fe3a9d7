"""Export: write the bundle (all variants, to be used with the user's base model), or one variant as a file
of its own."""

from __future__ import annotations

from pathlib import Path

import torch

from ...models.bundle import BUNDLE_SUFFIX, write_bundle
from ...models.bundle_contents import bundle_entries
from ...models.stock_files import Contents, write_contents
from ...models.storing import MIXED, check_bits, check_store
from ...models.teacher_hashes import teacher_hashes
from ...models.variant_sources import variant_sources
from ...models.weights import Weights
from ...plan import PruningPlan
from ...run import Run
from ...settings.convert_settings import ExportConfig
from ...system.atomic import write_json
from ..chosen_bits import REST, BitChooser, Bits
from ..exported import contents_of
from ..inputs import open_plan
from ..run_students import RunStudents


def export(config: ExportConfig) -> Path:
    """Returns the file (or diffusers folder). Raises ValueError for a variant that the layout cannot
    hold, for students that are not trained yet, and for a budget that no choice of formats meets."""
    check_store(config.layout, config.store)
    check_bits(config.layout, config.store, config.budget_gb, config.refit)
    run, weights = Run(config.run), Weights(config.model)
    plan = open_plan(config, weights)
    if config.layout == "bundle":
        path = run.folder / "exports" / f"{config.name}{BUNDLE_SUFFIX}"
        entries = list(bundle_entries(run, plan, config.store))
        write_bundle(path, plan, entries, teacher_hashes(weights))
        return path
    if config.store == MIXED or config.refit:
        with torch.no_grad():
            return _with_bits(config, weights, plan)
    students = RunStudents(run, weights.config, weights.architecture)
    variant = plan.variant(config.variant)
    tensors = variant_sources(students, weights, plan, variant)
    contents = contents_of(config.layout, weights, plan, variant, tensors)
    return _write(config, weights, contents, {})


def _with_bits(config: ExportConfig, weights: Weights, plan: PruningPlan) -> Path:
    """Formats by the calibration set, and a report of them beside the file."""
    students = RunStudents(Run(config.run), weights.config, weights.architecture)
    chooser = BitChooser(config, weights, students, plan)
    bits = chooser.bits()
    contents = chooser.contents(bits.variant, chooser.refitted(bits) if config.refit else None)
    path = _write(config, weights, contents, chooser.names(bits, contents))
    if config.store == MIXED:
        _tell(config, path, bits)
    return path


def _tell(config: ExportConfig, path: Path, bits: Bits) -> None:
    report = {"budget_gb": config.budget_gb, "bytes": path.stat().st_size, **bits.to_json()}
    write_json(path.with_suffix(".bits.json"), report)
    counts = ", ".join(f"{count} {store}" for store, count in report["matrices"].items())
    print(
        f"{report['bytes']:,} bytes of {config.budget_gb * 1e9:,.0f}; replaced: {' '.join(bits.variant.intervals) or 'none'}; "
        f"matrices: {counts}; predicted damage {bits.damage:.4g}"
    )


def _write(
    config: ExportConfig, weights: Weights, contents: Contents, stores: dict[str, str]
) -> Path:
    """stores: by name in the file, where they are not all in `config.store`."""
    path = Run(config.run).folder / "exports" / config.name
    store = REST if config.store == MIXED else config.store
    return write_contents(path, config.layout, store, weights.architecture, contents, stores=stores)
