"""A run on a tiny model of several kinds of blocks, from students to a fine-tuned variant, and what
holds of any such run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ppcl_engine.models.opening import open_model
from ppcl_engine.plan import SITE_KINDS, parse_intervals
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import ExportConfig
from ppcl_engine.settings.prune_settings import (
    DetectConfig,
    DistillWidthConfig,
    FinetuneConfig,
    PolishConfig,
    VariantsConfig,
)
from ppcl_engine.stages.convert.export import export
from ppcl_engine.stages.prune.detect import detect
from ppcl_engine.stages.prune.distill_width import distill_width
from ppcl_engine.stages.prune.finetune import finetune
from ppcl_engine.stages.prune.polish import polish
from ppcl_engine.stages.prune.variants import variants
from ppcl_engine.system.atomic import read_json, write_text
from ppcl_engine.system.tensor_files import TensorFile


def with_students(teacher: Path, folder: Path, intervals: str, run_stages) -> Run:
    """A run with students for these intervals, without corrections; `folder` holds a calibration
    set."""
    run = run_stages(teacher, folder, "probe", "detect")
    write_text(run.plan, run.load_plan().with_parts(intervals=parse_intervals(intervals)).to_json())
    return run_stages(teacher, folder, "distill_depth", correction="none")


def copied(depth: Run, folder: Path) -> Run:
    """A run folder of its own on the same students."""
    run = Run(folder)
    run.folder.mkdir()
    for path in (depth.calibration, depth.students, depth.probes):
        (run.folder / path.name).symlink_to(path)
    run.plan.write_text(depth.plan.read_text())
    return run


def detected_at_any_price(depth: Run, teacher: Path, folder: Path, **settings) -> Run:
    """A copy of the run, with intervals that thresholds do not end: kinds of blocks alone do."""
    run = copied(depth, folder)
    loose = {"max_drop": 10.0, "eps": 10.0, "bootstrap": 3, "tokens": 3}
    detect(DetectConfig(model=teacher, run=run.folder, device="cpu", **loose, **settings))
    return run


def measured_pairs(run: Run) -> set[tuple[int, int]]:
    """(first, last) of every interval whose alignment was measured."""
    cka = TensorFile(run.curves).read("cka")[:, :, 0]
    return {(u, u + j) for u, j in cka.isfinite().nonzero().tolist()}


def finished(teacher: Path, run: Run, sites: str, streamed: bool = False) -> Run:
    """Width, polish, variants and fine-tune of a run with students."""
    common = {"model": teacher, "run": run.folder, "device": "cpu", "streamed": streamed}
    trained = {"rounds": 1, "updates": 4, "warm_up": 1, "learning_rate": 1e-3}
    distill_width(DistillWidthConfig(**common, **trained, sites=sites))
    polish(PolishConfig(**common, steps=3, learning_rate=1e-3, save_every=2))
    variants(VariantsConfig(**common, samples=12))
    finetune(FinetuneConfig(**common, steps=2, variant="all", name="tuned", save_every=2))
    return run


def own_weights(student: Path) -> dict[str, torch.Tensor]:
    """A student's tensors as its block names them."""
    tensors = TensorFile(student).read_all()
    return {
        name.removeprefix("weight."): t for name, t in tensors.items() if name.startswith("weight.")
    }


def weighed(run: Run) -> dict[str, set[int]]:
    """Kind of site -> blocks where detect-width weighed one (of a text group its first)."""
    names = [row["name"].split(":") for row in read_json(run.width)["candidates"]]
    return {
        kind: {int(blocks.split("-")[0]) for k, blocks in names if k == kind} for kind in SITE_KINDS
    }


def check_same_bits(run: Run, other: Run) -> None:
    """All that was trained, and the plan but for times."""
    names = [
        p.relative_to(run.folder)
        for folder in (run.students, run.projections, run.polished_parts, run.tuned)
        for p in sorted(folder.rglob("*.safetensors"))
    ]
    assert len(names) > 10
    for name in names:
        ours, theirs = (TensorFile(r.folder / name).read_all() for r in (run, other))
        assert ours.keys() == theirs.keys() and all(
            torch.equal(t, theirs[n]) for n, t in ours.items()
        ), name
    plans = [r.load_plan() for r in (run, other)]
    untimed = [
        p.with_parts(variants=tuple(replace(v, milliseconds=None) for v in p.variants))
        for p in plans
    ]
    assert untimed[0] == untimed[1]


def check_given_back(run: Run, teacher: Path, model, architecture, inputs) -> None:
    """From the bundle: all parts given back are the teacher to the bit; variants differ."""
    bundle = export(ExportConfig(model=teacher, run=run.folder, store="float32"))
    full = open_model(bundle, "full", teacher)
    assert torch.equal(architecture.call(full, inputs), architecture.call(model, inputs))
    names = [variant.name for variant in run.load_plan().variants]
    outputs = {name: architecture.call(open_model(bundle, name, teacher), inputs) for name in names}
    assert (
        len({tuple(t.flatten()[:4].tolist()) for t in outputs.values()}) > 2 and "tuned" in outputs
    )


def check_width_pruned_file(
    run: Run, teacher: Path, architecture, inputs, variant: str
) -> TensorFile:
    """A file of its own opens as the bundle's variant, and stock hosts get none."""
    options = {"model": teacher, "run": run.folder, "store": "float32"}
    bundle = export(ExportConfig(**options))
    path = export(ExportConfig(**options, layout="ppcl", variant=variant, name=f"file-{variant}"))
    expected = architecture.call(open_model(bundle, variant, teacher), inputs)
    assert torch.equal(architecture.call(open_model(path), inputs), expected)
    with pytest.raises(ValueError, match="has width site .* which stock diffusers cannot run"):
        export(ExportConfig(**options, layout="diffusers", variant="all"))
    return TensorFile(path)


def check_depth_alone(
    depth: Run,
    teacher: Path,
    architecture,
    inputs,
    variant: str,
    expected: torch.Tensor,
    kind: type,
):
    """Students alone: stock diffusers (`kind`), a ComfyUI file and the bundle compute `expected`.
    Returns the first two."""
    variants(VariantsConfig(model=teacher, run=depth.folder, device="cpu", samples=12))
    common = {"model": teacher, "run": depth.folder, "store": "float32", "variant": variant}
    stock = kind.from_pretrained(
        export(ExportConfig(**common, layout="diffusers", name="stock"))
    ).eval()
    stock.requires_grad_(False)  # torch multiplies without a bias in another order where it is on
    single = export(ExportConfig(**common, layout="comfyui", name="single"))
    bundle = export(ExportConfig(**common, layout="bundle"))
    for model in (stock, open_model(single), open_model(bundle, variant, teacher)):
        assert torch.equal(architecture.call(model, inputs), expected)
    return stock, single
