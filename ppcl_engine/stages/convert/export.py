"""Export: write the bundle (all variants, to be used with the user's base model), or one variant as a file
of its own."""

from __future__ import annotations

from pathlib import Path

from ...models.bundle import BUNDLE_SUFFIX, write_bundle
from ...models.bundle_contents import bundle_entries
from ...models.layout import layout_of
from ...models.standalone import write_standalone
from ...models.stock_files import SOURCE_PLAN_KEY, refuse_what_stock_lacks, write_stock
from ...models.storing import check_store
from ...models.teacher_hashes import teacher_hashes
from ...models.variant_sources import variant_sources
from ...models.weights import Weights
from ...run import Run
from ...settings.convert_settings import ExportConfig
from ..inputs import open_plan
from ..run_students import RunStudents


def export(config: ExportConfig) -> Path:
    """Returns the file (or diffusers folder). Raises ValueError for a variant that the layout cannot
    hold, and for students that are not trained yet."""
    check_store(config.layout, config.store)
    run, weights = Run(config.run), Weights(config.model)
    plan = open_plan(config, weights)
    folder = run.folder / "exports"
    if config.layout == "bundle":
        path = folder / f"{config.name}{BUNDLE_SUFFIX}"
        entries = list(bundle_entries(run, plan, config.store))
        write_bundle(path, plan, entries, teacher_hashes(weights))
        return path
    variant, architecture = plan.variant(config.variant), weights.architecture
    students = RunStudents(run, weights.config, architecture)
    tensors = variant_sources(students, weights, plan, variant)
    if config.layout == "ppcl":
        return write_standalone(
            folder / f"{config.name}.safetensors", tensors, plan, variant, config.store
        )
    refuse_what_stock_lacks(plan, variant, config.layout)
    return write_stock(
        folder / config.name,
        config.layout,
        config.store,
        architecture,
        weights.config,
        [place.index for place in layout_of(plan, variant).places],
        tensors,
        {SOURCE_PLAN_KEY: plan.to_json()},
    )
