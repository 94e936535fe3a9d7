"""Each kind of file is read by what it should be: one line that names the file and the field for
anything else."""

from __future__ import annotations

import json

import pytest
import torch

from ppcl_engine.algorithms.detection.stream_maps import load_probe
from ppcl_engine.algorithms.distillation.trainer import Trainer, saved_step
from ppcl_engine.algorithms.sparsity.files import sparsity_of
from ppcl_engine.architectures.folded import folding_of
from ppcl_engine.data.calibration import KIND, load_calibration
from ppcl_engine.data.codecs.pipeline_files import PooledVAE, Scheduler
from ppcl_engine.jobs.state import STATE, read_events, read_state
from ppcl_engine.models.folding.tables import TABLE_KEY, read_table
from ppcl_engine.report.result_files import Detection, Evaluation
from ppcl_engine.system.pickled_files import PickledFile
from ppcl_engine.system.schemas import read_checked_object
from ppcl_engine.system.tensor_files import write_tensors

BATCH = {
    "hidden_states": torch.ones(2, 4, 3),
    "timestep": torch.ones(2),
    "encoder_hidden_states": torch.ones(2, 3, 5),
    "encoder_hidden_states_mask": torch.ones(2, 3, dtype=torch.bool),
    "grid": torch.tensor([[1, 2, 2]]),
}
CALIBRATIONS = {
    "another name": ({"x": torch.ones(1)}, "'x' is not the name of a batch's tensor"),
    "digits of another script": (
        {"٠.hidden_states": torch.ones(1)},
        "is not the name of a batch's tensor",
    ),
    "a gap in the numbers": ({f"2.{n}": t for n, t in BATCH.items()}, "are not numbered from 0"),
    "no timestep": ({"0.timestep": None}, "batch 0 lacks timestep"),
    "fewer samples": ({"0.timestep": torch.ones(1)}, r"is of \(2,\) samples, timestep of 1"),
    "another dimension": ({"0.timestep": torch.ones(2, 1)}, r"0.timestep has shape \(2, 1\)"),
    "whole numbers": (
        {"0.hidden_states": torch.ones(2, 4, 3, dtype=torch.int64)},
        "0.hidden_states is torch.int64",
    ),
    "a grid of other tokens": ({"0.grid": torch.tensor([[1, 2, 3]])}, "has 4 tokens, its grid 6"),
    "a grid without end": (
        {"0.grid": torch.tensor([[1, 2**40, 2]])},
        "is not .frames, rows, columns. of pictures",
    ),
    "an empty grid": (
        {"0.grid": torch.ones(0, 3, dtype=torch.int64)},
        "is not .frames, rows, columns.",
    ),
}


@pytest.mark.parametrize("change, reason", CALIBRATIONS.values(), ids=CALIBRATIONS)
def test_a_calibration_set(tmp_path, change, reason):
    tensors = {**{f"0.{name}": tensor for name, tensor in BATCH.items()}, **change}
    write_tensors(
        tmp_path / "c.safetensors",
        {n: t for n, t in tensors.items() if t is not None},
        {KIND: "{}"},
    )
    with pytest.raises(ValueError, match=f"c.safetensors: .*{reason}.*; run calibrate again"):
        load_calibration(tmp_path / "c.safetensors")


@pytest.mark.parametrize("origin", ["[]", "{", "7", "null", '{"a": NaN}', "[" * 30000])
def test_a_calibration_sets_origin(tmp_path, origin):
    write_tensors(
        tmp_path / "c.safetensors", {f"0.{n}": t for n, t in BATCH.items()}, {KIND: origin}
    )
    with pytest.raises(ValueError, match=f"c.safetensors: {KIND}"):
        load_calibration(tmp_path / "c.safetensors")


@pytest.mark.parametrize("name, shape", [("image", (3, 4)), ("x", (4, 4)), ("image", (4,))])
def test_a_probe(tmp_path, name, shape):
    write_tensors(
        tmp_path / "p.safetensors",
        {f"{name}.weight": torch.ones(shape), f"{name}.bias": torch.ones(4)},
    )
    with pytest.raises(ValueError, match="p.safetensors: .* is not a square map of a stream"):
        load_probe(tmp_path / "p.safetensors")
    write_tensors(tmp_path / "p.safetensors", {"image.weight": torch.ones(4, 4)})
    with pytest.raises(ValueError, match="p.safetensors lacks the tensor image.bias"):
        load_probe(tmp_path / "p.safetensors")


@pytest.mark.parametrize("step", ["", "-1", "x", "٣", "1.5", "9" * 30])
def test_a_saved_training_says_how_far_it_is(tmp_path, step):
    write_tensors(
        tmp_path / "t.safetensors", {"losses": torch.ones(1)}, {"step": step, "settings": "{}"}
    )
    with pytest.raises(
        ValueError, match="t.safetensors: its metadata says step .*, which is not a number"
    ):
        saved_step(tmp_path / "t.safetensors", "{}")


def test_a_saved_training_is_of_the_same_module(tmp_path):
    path = tmp_path / "t.safetensors"
    about = {"step": "1", "settings": "{}"}
    rows = {
        "weight.weight has shape": {"weight.weight": torch.ones(1), "weight.bias": torch.ones(2)},
        "lacks the tensor weight.bias": {"weight.weight": torch.ones(2, 3)},
        "is torch.int64, not numbers": {
            "weight.weight": torch.ones(2, 3, dtype=torch.int64),
            "weight.bias": torch.ones(2),
        },
        "has only first.bias of": {
            "weight.weight": torch.ones(2, 3),
            "weight.bias": torch.ones(2),
            "first.bias": torch.ones(2),
        },
        "second.bias has shape": {
            "weight.weight": torch.ones(2, 3),
            "weight.bias": torch.ones(2),
            "first.bias": torch.ones(2),
            "second.bias": torch.ones(1),
        },
    }
    for reason, tensors in rows.items():
        write_tensors(path, {**tensors, "losses": torch.ones(1)}, about)
        with pytest.raises(ValueError, match=f"t.safetensors.*{reason}"):
            Trainer(torch.nn.Linear(3, 2), 0.0).restore(path)
    write_tensors(path, {}, {"step": "1"})
    with pytest.raises(ValueError, match="t.safetensors lacks the metadata 'settings'"):
        saved_step(path, "{}")
    write_tensors(path, {}, {"step": "1", "settings": "[1]"})
    with pytest.raises(ValueError, match="t.safetensors: settings"):
        saved_step(path, "{}")


@pytest.mark.parametrize(
    "change",
    [{"pid": 2**63}, {"step": -1}, {"process_started": 1e300}, {"pid": "1"}, {"pid": True}],
)
def test_a_jobs_state(tmp_path, change):
    (tmp_path / STATE).write_text(
        json.dumps({"status": "running", "pid": 1, "host": "x", **change})
    )
    with pytest.raises(ValueError, match=f"state.json.*{next(iter(change))}"):
        read_state(tmp_path)


@pytest.mark.parametrize("line", ["[" * 30000, '{"kind": 1}', '{"kind": "x", "time": NaN}', "x"])
def test_a_jobs_events(tmp_path, line):
    (tmp_path / "events.jsonl").write_text('{"kind": "started"}\n' + line + "\n")
    with pytest.raises(ValueError, match="events.jsonl, line 2: not an event"):
        read_events(tmp_path)


def test_a_bin_of_odd_things(tmp_path):
    sparse, meta = torch.eye(2).to_sparse(), torch.ones(2, device="meta")
    for content in (
        {1: torch.ones(1)},
        {("a", 1): torch.ones(1)},
        [torch.ones(1)],
        {"a": sparse},
        {"a": 3},
        {"a": meta},
    ):
        torch.save(content, tmp_path / "m.bin")
        with pytest.raises(ValueError, match="m.bin is not a plain dict of tensors"):
            PickledFile(tmp_path / "m.bin")


ABOUT = {"key": "k", "timesteps": [0.0, 0.5], "batches": [1]}


@pytest.mark.parametrize(
    "change",
    [{"batches": [0]}, {"timesteps": ["0"]}, {"more": 1}, {"batches": [10**12]}, {"key": None}],
)
def test_a_table_of_modulations(tmp_path, change):
    write_tensors(
        tmp_path / "t.safetensors", {"a": torch.ones(3, 2)}, {TABLE_KEY: json.dumps(ABOUT | change)}
    )
    with pytest.raises(ValueError, match=f"t.safetensors: {TABLE_KEY}: .*{next(iter(change))}"):
        read_table(tmp_path / "t.safetensors", "k")
    write_tensors(
        tmp_path / "t.safetensors", {"a": torch.ones(3, 3)}, {TABLE_KEY: json.dumps(ABOUT)}
    )
    with pytest.raises(ValueError, match=r"t.safetensors: a \(3, 3\) does not have 2 columns"):
        read_table(tmp_path / "t.safetensors", "k")


@pytest.mark.parametrize(
    "values",
    [
        [],
        {"form": "table"},
        {"form": "table", "inputs": True},
        {"form": "table", "inputs": 2, "batches": 3},
        {"form": "table", "inputs": 2, "batches": [10**9]},
        {"form": "table", "inputs": 2, "precision": []},
        {"form": "basis", "inputs": 2, "mark": 7},
    ],
)
def test_a_folding(values):
    with pytest.raises(ValueError, match="folding"):
        folding_of({"folding": values})


def test_what_was_made_sparse():
    with pytest.raises(ValueError, match="ppcl_sparsity: .*missing"):
        sparsity_of({"ppcl_sparsity": '{"pattern": "2:4"}'})


RESULTS = {
    "a list": (Evaluation, "[]", "is not a JSON object"),
    "no variants": (
        Evaluation,
        '{"variants": [], "captions_shown": []}',
        "variants List should have at least 1",
    ),
    "a variant without a name": (
        Evaluation,
        '{"variants": [{"parameters": 1}], "captions_shown": []}',
        r"variants\[0\]: the field 'name' is missing",
    ),
    "blocks as text": (
        Detection,
        '{"method": "a", "intervals": [{"first": "1", "last": 2}]}',
        r"intervals\[0\].first should be a valid integer",
    ),
    "a VAE without channels": (PooledVAE, "{}", "the field 'latent_channels' is missing"),
    "a schedule that is text": (
        Scheduler,
        '{"base_shift": "0.5"}',
        "base_shift should be a valid number",
    ),
}


@pytest.mark.parametrize("kind, text, reason", RESULTS.values(), ids=RESULTS)
def test_results_and_parts_of_pipelines(tmp_path, kind, text, reason):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=f"r.json.*{reason}"):
        read_checked_object(tmp_path / "r.json", kind)
