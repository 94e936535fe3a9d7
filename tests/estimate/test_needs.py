"""What a stage takes, and refusing what cannot fit."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ppcl_engine.__main__ import read_run_file, run_file
from ppcl_engine.estimate.advice import ADVICE
from ppcl_engine.estimate.counts import Count
from ppcl_engine.estimate.dry_run import print_estimate, refusal
from ppcl_engine.estimate.needs import DEMANDS, needs
from ppcl_engine.jobs.spec import ALLOWED, JobSpec, configs
from ppcl_engine.models.opening import model_config
from ppcl_engine.models.weights import Weights, parameter_count
from ppcl_engine.settings.convert_settings import AdaptLoraConfig, ExportConfig, SparsifyConfig
from ppcl_engine.settings.prune_settings import (
    CalibrateConfig,
    DetectConfig,
    DistillDepthConfig,
    FinetuneConfig,
    PolishConfig,
    ProbeConfig,
    VariantsConfig,
)
from ppcl_engine.stages import STAGES
from ppcl_engine.stages.convert.export import export
from ppcl_engine.system.machine import device_memory, free_disk

from ..tiny.trained_run import tuned_run

GB = 1e9
PACK = Path(__file__).parents[2]


def test_every_stage_of_a_job_is_counted_and_has_advice():
    kinds = {STAGES[stage][0] for stage in ALLOWED}
    assert kinds == set(DEMANDS) == set(ADVICE)


@pytest.mark.parametrize("stage", ALLOWED)
def test_a_tiny_model_fits(stage, teacher_file, make_run, tmp_path):
    folder = make_run(tmp_path, teacher_file)
    size = {"height": 64, "width": 64} if stage == "calibrate" else {}
    model = "path" if stage == "sparsify" else "model"
    size |= {"lora": "style.safetensors"} if stage == "adapt-lora" else {}
    ((_, config),) = configs(
        JobSpec(stages=((stage, {model: str(teacher_file), "device": "cpu", **size}),)), folder
    )
    assert refusal(config) is None
    wanted = needs(config)
    assert wanted.stage == stage and wanted.memory >= wanted.at_least >= 0 <= wanted.disk < 1e8
    assert 0 <= wanted.seconds < 1000


def test_a_resident_teacher_counts_its_weights(teacher_file, make_run, tmp_path):
    folder, weights = make_run(tmp_path, teacher_file), Weights(teacher_file)
    size = 4 * sum(weights.read(key).numel() for key in weights.keys())
    common = {"model": teacher_file, "run": folder, "device": "cpu"}
    resident, streamed = (
        needs(ProbeConfig(**common, streamed=streamed)) for streamed in (False, True)
    )
    assert size < resident.at_least < 2 * size and streamed.at_least < resident.at_least
    on_disk = needs(DetectConfig(**common, streamed=True)), needs(DetectConfig(**common))
    assert on_disk[0].disk > on_disk[1].disk


def test_more_work_takes_more(teacher_file, make_run, tmp_path):
    common = {"model": teacher_file, "run": make_run(tmp_path, teacher_file), "device": "cpu"}
    short, long = (needs(PolishConfig(**common, steps=steps)).seconds for steps in (100, 1000))
    assert long > 5 * short
    kept, again = (needs(PolishConfig(**common, checkpointing=c)).memory for c in (False, True))
    assert again < kept


def test_the_calibration_of_the_same_job_counts_before_it_is_there(teacher_file, tmp_path):
    common = {"model": teacher_file, "run": tmp_path, "device": "cpu"}
    few, many = (CalibrateConfig(**common, samples=n, height=512, width=512) for n in (16, 1600))
    detect = DetectConfig(**common, samples=2000)
    assert needs(detect, many).at_least > 10 * needs(detect, few).at_least > needs(detect).at_least


def test_what_cannot_fit_is_refused_with_what_would(tmp_path):
    """Twenty billion parameters: no weights are read."""
    config = ProbeConfig(model=Path("qwen_image"), run=tmp_path, device="cpu")
    resident, streamed = (
        needs(replace(config, streamed=streamed)).at_least for streamed in (False, True)
    )
    assert 80 * GB < resident < 85 * GB and streamed < 5 * GB
    if device_memory("cpu") < resident:
        assert re.fullmatch(
            r"probe needs 8\d\.\d GB of memory or more on cpu, \d+\.\d GB are there: turn on streamed \(.*\)",
            refusal(config),
        )
        assert refusal(replace(config, streamed=True)) is None
    tuned = FinetuneConfig(model=Path("qwen_image"), run=tmp_path, device="cpu", checkpointing=True)
    assert needs(tuned).at_least > 200 * GB
    if device_memory("cpu") < 200 * GB:
        assert "choose a smaller variant" in refusal(
            replace(tuned, streamed=True)
        ) and "a device with more memory" in refusal(tuned)


@pytest.mark.parametrize("kind", [PolishConfig, FinetuneConfig])
def test_streamed_training_takes_a_block_and_the_rest_waits(tmp_path, kind):
    """16 bytes a parameter in training, in the host's memory or in files; a run without a plan
    trains half of the 20 B in finetune."""
    config = kind(model=Path("qwen_image"), run=tmp_path, device="cpu", streamed=True)
    in_memory, on_disk = (needs(replace(config, offload=o)) for o in ("memory", "disk"))
    trained = Count(config, None).trained(config)
    waits = 16 * trained
    compact = needs(replace(config, offload="memory", optimizer_state="compact"))
    assert 8 * trained < compact.host < 8.1 * trained
    assert on_disk.at_least < 14 * GB and on_disk.host == 0
    assert waits <= in_memory.host < 1.01 * waits
    assert in_memory.at_least == on_disk.at_least + in_memory.host
    assert on_disk.disk > 2 * waits > in_memory.disk == waits
    stepped = 0.7 * config.steps * waits  # of polish a quarter is off, in the mean
    assert on_disk.read > in_memory.read + stepped and on_disk.written > in_memory.written + stepped


@pytest.mark.parametrize(
    "name, parameters", [("flux1_dev", 11_901_408_320), ("sd35_medium", 2_243_171_520)]
)
def test_blocks_of_several_kinds_are_summed_one_by_one(tmp_path, name, parameters):
    """Block 0 is of the largest kind: as many of it as there are blocks would be too much."""
    _, architecture, config = model_config(Path(name))
    with torch.device("meta"):
        sizes = [
            parameter_count(architecture.build_block(config, i))
            for i in range(architecture.num_blocks(config))
        ]
    probe = ProbeConfig(model=Path(name), run=tmp_path, device="cpu")
    count, again = (Count(replace(probe, streamed=s), None) for s in (False, True))
    assert count.teacher == 4 * parameters < 0.95 * 4 * len(sizes) * sizes[0]
    assert again.teacher == 4 * (parameters - sum(sizes) + sizes[0] + sizes[1])
    resident, streamed = (
        needs(VariantsConfig(model=Path(name), run=tmp_path, device="cpu", streamed=s))
        for s in (False, True)
    )
    assert resident.at_least - streamed.at_least == count.teacher - again.teacher


def test_no_block_is_built_to_count_it(monkeypatch, tmp_path):
    """diffusers, whose import takes seconds, stays out of a dry run."""
    _, architecture, _ = model_config(Path("flux1_lite"))
    monkeypatch.setattr(type(architecture), "build_block", None)
    monkeypatch.setattr(type(architecture), "build_outer", None)
    for kind in set(DEMANDS) - {AdaptLoraConfig}:  # which counts a file
        model = "path" if kind is SparsifyConfig else "model"
        config = kind(**{model: Path("flux1_lite"), "run": tmp_path, "device": "cpu"})
        assert needs(config).memory > 0


def test_making_a_model_sparse_counts_its_matrices(teacher_file, make_run, tmp_path):
    """It counts the matrices of one block: its exact layers take the memory, not the model."""
    config = SparsifyConfig(path=teacher_file, run=make_run(tmp_path, teacher_file), device="cpu")
    assert (
        0
        < needs(replace(config, skip="mlp")).at_least
        < needs(config).at_least
        < needs(config).memory
    )
    assert needs(replace(config, streamed=True)).at_least < needs(config).at_least
    plain = replace(config, granularity="layer", exchange=False, compensate=False)
    assert needs(plain).seconds < needs(config).seconds
    assert needs(replace(config, pattern="2:4")).disk < needs(config).disk


def test_a_large_model_is_made_sparse_with_little_memory(capsys, tmp_path):
    """Its largest block, Gram matrices of 3,072 and 12,288 columns, a sample's states; no weights
    are read."""
    config = SparsifyConfig(path=Path("qwen_image"), run=tmp_path, device="cpu", dry_run=True)
    print_estimate(config)
    said = capsys.readouterr().out
    assert "60 blocks, 20.43 B parameters" in said and "sparsify with these settings" in said
    assert "resident" in said and "streamed" in said
    assert 4 * GB < needs(config).at_least < 10 * GB and 80 * GB < needs(config).disk < 85 * GB


def test_bits_are_chosen_with_little_memory(tmp_path):
    config = ExportConfig(
        model=Path("qwen_image"),
        run=tmp_path,
        device="cpu",
        layout="ppcl",
        store="mixed",
        budget_gb=8,
        streamed=True,
    )
    assert 4 * GB < needs(config).at_least < 10 * GB and 8 * GB < needs(config).disk < 9 * GB
    assert needs(config).seconds < needs(replace(config, refit=True)).seconds


def test_a_variant_counts_what_is_left_of_it(teacher_file, make_run, tmp_path):
    run = tuned_run(make_run(tmp_path, teacher_file), teacher_file)
    bundle = export(ExportConfig(model=teacher_file, run=run.folder))
    config = SparsifyConfig(
        path=bundle, base=teacher_file, variant="smallest", run=run.folder, device="cpu"
    )
    assert needs(config).disk < needs(replace(config, variant="full")).disk
    alone = export(
        ExportConfig(
            model=teacher_file, run=run.folder, layout="ppcl", variant="smallest", name="alone"
        )
    )
    assert needs(replace(config, path=alone, base=None, variant=None)).disk == needs(config).disk
    with pytest.raises(
        ValueError,
        match="is a bundle: students only; give the base model it was made from as --base",
    ):
        needs(replace(config, base=None))


def test_the_disk_is_looked_at_where_the_run_will_be(tmp_path):
    assert free_disk(tmp_path / "not" / "yet") == pytest.approx(free_disk(tmp_path), rel=0.01)
    assert device_memory("cpu") > 0


def test_the_recipe_for_full_size_reads_the_model_a_few_times(tmp_path, monkeypatch, capsys):
    """A row for each stage of the run file, and what all of them read: less than 10 TB from bf16."""
    for module in ("traffic", "counts"):
        monkeypatch.setattr(f"ppcl_engine.estimate.{module}.free_memory", lambda: 20 * GB)
    monkeypatch.setattr("ppcl_engine.models.streaming.free_memory", lambda: 20 * GB)
    text = (PACK / "configs" / "qwen_image_10b.toml").read_text()
    kept, tuned = text.split("[polish]")[0], text.split("[variants]")[1].split("[evaluate]")[0]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        kept.replace('"models/Qwen-Image"', '"qwen_image"').replace("runs/", f"{tmp_path}/")
        + f"[variants]{tuned}"
    )
    run_file(recipe, dry_run=True)
    _, *rows, total = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[1:]] == [stage for stage, _ in read_run_file(recipe)]
    read, written = re.fullmatch(
        r"together: (\S+) TB read, (\S+) TB written, \S+ FLOPs, \S+ hours here", total
    ).groups()
    assert float(read) < 10 and float(written) < 2.5


def test_a_run_file_without_an_estimate_is_refused(tmp_path):
    recipe = tmp_path / "inspect.toml"
    recipe.write_text(f"[inspect]\npath = '{tmp_path}'\n")
    with pytest.raises(ValueError, match="none of these stages has an estimate; name one"):
        run_file(recipe, dry_run=True)


def test_few_rounds_read_less(tmp_path):
    """The same number of updates: the model is swept less often, trainings change places less
    often."""
    common = {"model": Path("qwen_image"), "run": tmp_path, "device": "cpu", "streamed": True}
    many, few = (
        needs(DistillDepthConfig(**common, rounds=rounds, updates=6000 // rounds, cache_gb=80.0))
        for rounds in (150, 15)
    )
    assert few.read < many.read / 5 and few.written < many.written / 5
    resident = needs(DistillDepthConfig(**{**common, "streamed": False}, rounds=15, updates=400))
    assert resident.read < few.read


def test_processes_that_shard_a_training_have_their_part_of_it_each(
    teacher_file, make_run, tmp_path, capsys
):
    config = PolishConfig(model=teacher_file, run=make_run(tmp_path, teacher_file), device="cpu")
    teacher = Count(config, None).teacher
    alone, two, eight = (needs(config, processes=count).at_least - teacher for count in (1, 2, 8))
    assert two == pytest.approx(alone / 2, abs=1) and eight == pytest.approx(alone / 8, abs=1)
    assert needs(replace(config, parallel="data"), processes=2).at_least == alone + teacher
    print_estimate(config)
    rows = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in rows if " processes " in line] == ["2", "4", "8"]
