"""One small file of every kind that the engine reads, with what reads it: the right result, as a
hash, or an error."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from ppcl_engine.algorithms.detection.stream_maps import load_probe
from ppcl_engine.algorithms.distillation.saved_training import step_of
from ppcl_engine.algorithms.distillation.trainer import Trainer, saved_weights
from ppcl_engine.architectures import architecture_named
from ppcl_engine.data.calibration import CLEAN, CalibrationSet, load_calibration, save_calibration
from ppcl_engine.jobs.spec import JobSpec, read_spec, write_spec
from ppcl_engine.jobs.state import (
    EVENTS,
    STATE,
    JobState,
    append_event,
    read_events,
    read_state,
    write_state,
)
from ppcl_engine.models.bundle import Bundle, write_bundle
from ppcl_engine.models.bundle_contents import projection_prefix, student_prefix
from ppcl_engine.models.folding.tables import Table, read_table, write_table
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.standalone import write_standalone
from ppcl_engine.models.surgery import build_student
from ppcl_engine.models.teacher_hashes import teacher_hashes
from ppcl_engine.models.tensor_sources import Source, comfyui_sources
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import Interval, PruningPlan, Variant, WidthSite
from ppcl_engine.run import Run
from ppcl_engine.system.atomic import write_json, write_text
from ppcl_engine.system.tensor_files import TensorEntry, TensorFile, write_tensors

ARCHITECTURE = architecture_named("qwen_image")
CONFIG = {
    **ARCHITECTURE.tiny_config,
    "num_layers": 4,
    "attention_head_dim": 8,
    "axes_dims_rope": [2, 2, 4],
}
FLUX = architecture_named("flux1")
FLUX_CONFIG = {
    **FLUX.tiny_config,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
}


@dataclass(frozen=True)
class Subject:
    """files: those that may be damaged. hashed: a change in one of them has to be found. read: the
    right result's hash."""

    name: str
    files: tuple[Path, ...]
    hashed: bool
    read: Callable[[], str]


def digest(tensors: Iterable[tuple[str, torch.Tensor]], *more: object) -> str:
    """A hash of the tensors' names, types, shapes and bits."""
    state = xxhash.xxh3_64(repr(more).encode("utf-8", "surrogatepass"))
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        state.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode("utf-8", "surrogatepass"))
        state.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def subjects(folder: Path) -> list[Subject]:
    """Made in `folder`, which is left as it is by reading."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = _model(ARCHITECTURE, CONFIG)
        single = folder / "single" / "teacher.safetensors"
        write_tensors(single, model.state_dict(), {"config": json.dumps(CONFIG)})
        return [
            Subject("single file of ours", (single,), True, lambda: _weights(single)),
            *_foreign(folder, model),
            *_ours(folder, single, model),
            *_of_runs(folder),
            *_refused(folder),
        ]


def _model(architecture, config: dict) -> torch.nn.Module:
    import diffusers

    model = getattr(diffusers, architecture.diffusers_class)(**config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter))
    return model


def _weights(path: Path) -> str:
    weights = Weights(path)
    return digest([(key, weights.read(key)) for key in weights.keys()], weights.config)


def _model_of(*arguments) -> str:
    model = open_model(*arguments)
    return digest(model.state_dict().items(), dict(model.config))


def _foreign(folder: Path, model: torch.nn.Module) -> list[Subject]:
    """Without hashes, as others write them: a changed number is a changed number."""
    from safetensors.torch import save_file

    plain, shards, pickled = folder / "foreign.safetensors", folder / "shards", folder / "pickled"
    flux = _model(FLUX, FLUX_CONFIG)
    sources = comfyui_sources(
        FLUX, {n: Source(tuple(t.shape), lambda t=t: t) for n, t in flux.state_dict().items()}
    )
    stored = {f"model.diffusion_model.{name}": source.read() for name, source in sources.items()}
    name = "model.diffusion_model.double_blocks.0.img_attn.qkv"
    weight = stored[f"{name}.weight"]
    scale = weight.abs().amax(1, keepdim=True) / 127
    stored[f"{name}.weight"], stored[f"{name}.weight_scale"] = (
        (weight / scale).round().to(torch.int8),
        scale,
    )
    save_file({n: t.contiguous() for n, t in stored.items()}, plain)
    model.save_pretrained(shards, max_shard_size="60KB")
    pickled.mkdir()
    torch.save(dict(model.state_dict()), pickled / "diffusion_pytorch_model.bin")
    write_json(pickled / "config.json", {"_class_name": ARCHITECTURE.diffusers_class, **CONFIG})
    return [
        Subject("single file of others", (plain,), False, lambda: _weights(plain)),
        Subject(
            "diffusers folder", tuple(sorted(shards.iterdir())), False, lambda: _weights(shards)
        ),
        Subject(
            "folder with .bin", tuple(sorted(pickled.iterdir())), False, lambda: _weights(pickled)
        ),
    ]


def _plan(weights: Weights) -> PruningPlan:
    intervals = (Interval(first=1, last=2, score=0.1, correction="2"),)
    return PruningPlan(
        architecture=ARCHITECTURE.name,
        config=weights.config,
        num_blocks=weights.num_blocks,
        fingerprint=weights.fingerprint,
        intervals=intervals,
        sites=(WidthSite(block=3, kind="ffn_image", form="gated"),),
        variants=(
            Variant(
                name="small", intervals=("1-2",), sites=("ffn_image:3",), parameters=1, damage=0.5
            ),
        ),
        provenance={"tool": "a"},
    )


def _ours(folder: Path, single: Path, model: torch.nn.Module) -> list[Subject]:
    weights = Weights(single)
    plan = _plan(weights)
    student = build_student(ARCHITECTURE, weights.config, plan.intervals[0]).state_dict()
    tensors = {student_prefix(plan.intervals[0]) + name: tensor for name, tensor in student.items()}
    width = ARCHITECTURE.width(CONFIG)
    for leaf, shape in (("weight", (width, width)), ("bias", (width,))):
        tensors[f"{projection_prefix('3', 'ffn_image')}map.{leaf}"] = torch.randn(shape)
    entries = [TensorEntry(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()]
    bundle, alone = (
        folder / "bundle" / "a.ppcl.safetensors",
        folder / "alone" / "pruned.safetensors",
    )
    write_bundle(bundle, plan, entries, teacher_hashes(weights))
    opened = open_model(bundle, "small", single).state_dict()
    write_standalone(
        alone,
        {name: Source(tuple(t.shape), lambda t=t: t) for name, t in opened.items()},
        plan,
        plan.variant("small"),
        "bfloat16",
    )

    def read_bundle() -> str:
        found = Bundle(bundle)
        return digest(
            [(name, found.file.read(name)) for name in found.file.keys()],
            found.plan,
            _model_of(bundle, "small", single),
        )

    return [
        Subject("bundle", (bundle,), True, read_bundle),
        Subject("bundle's base", (single,), True, lambda: _model_of(bundle, "1-2", single)),
        Subject("standalone", (alone,), True, lambda: _model_of(alone)),
    ]


def _calibration(path: Path) -> None:
    rows = []
    for _ in range(2):
        inputs = ARCHITECTURE.random_inputs(CONFIG, 2, (1, 2, 2), 3, "cpu")
        rows.append({**inputs, CLEAN: torch.randn_like(inputs["hidden_states"])})
    save_calibration(
        path,
        CalibrationSet(rows, {"architecture": ARCHITECTURE.name, "fingerprint": "f", "seed": 0}),
    )


def _read_calibration(path: Path) -> str:
    found = load_calibration(path)
    return digest([], found.hash, found.samples, found.origin)


def _read_training(path: Path, like: torch.nn.Module) -> str:
    trainer = Trainer(like, 0.0)
    trainer.restore(path)
    return digest(saved_weights(path).items(), step_of(TensorFile(path)), trainer.losses)


def _trained(path: Path) -> Callable[[], str]:
    trainer = Trainer(torch.nn.Linear(6, 5), 0.0)
    trainer.update(trainer.module(torch.randn(3, 6)).square().sum(), 1e-3, "x")
    trainer.save(path, json.dumps({"steps": 1}))
    return lambda: _read_training(path, torch.nn.Linear(6, 5))


def _read_probe(path: Path) -> str:
    maps = load_probe(path)
    return digest([(f"{name}{n}", t) for name, pair in maps.items() for n, t in enumerate(pair)])


def _read_table(path: Path) -> str:
    table = read_table(path, "k")
    return digest(table.columns.items(), table.timesteps, table.batches)


def _of_runs(folder: Path) -> list[Subject]:
    run = Run(folder / "run")
    _calibration(run.calibration)
    write_tensors(
        run.probe(0),
        {"image.weight": torch.randn(4, 4), "image.bias": torch.randn(4)},
        {"settings": "[1]"},
    )
    table = folder / "table.safetensors"
    write_table(table, Table((0.0, 0.5), (1,), {"a": torch.randn(6, 2)}), "k")
    trained = _trained(run.student("1-2"))
    write_text(run.plan, _plan(Weights(folder / "single" / "teacher.safetensors")).to_json())
    job = folder / "job"
    job.mkdir()
    write_spec(
        job,
        JobSpec(
            stages=(
                ("probe", {"model": "a", "ridge": 0.1}),
                ("detect", {"model": "a", "remove": 2}),
            )
        ),
    )
    write_state(
        job,
        JobState(status="running", stage="probe", number=1, stages=2, pid=1, host="x", rate=0.5),
    )
    append_event(job, "started", pid=1)
    append_event(job, "finished", number=1, stage="probe")
    return [
        Subject(
            "calibration set", (run.calibration,), True, lambda: _read_calibration(run.calibration)
        ),
        Subject("probe", (run.probe(0),), True, lambda: _read_probe(run.probe(0))),
        Subject("saved training", (run.student("1-2"),), True, trained),
        Subject("folding table", (table,), True, lambda: _read_table(table)),
        Subject("plan.json", (run.plan,), False, lambda: repr(run.load_plan())),
        Subject("run.json", (job / "run.json",), False, lambda: repr(read_spec(job))),
        Subject("state.json", (job / STATE,), False, lambda: repr(read_state(job))),
        Subject("events.jsonl", (job / EVENTS,), False, lambda: repr(read_events(job))),
    ]


def _refused(folder: Path) -> list[Subject]:
    """Files that are refused undamaged and must be refused damaged too, in the same line."""
    gguf, lora = folder / "model.gguf", folder / "lora.safetensors"
    gguf.write_bytes(b"GGUF" + bytes(range(256)) * 8)
    write_tensors(
        lora,
        {f"transformer_blocks.{n}.attn.to_q.lora_A.weight": torch.randn(2, 8) for n in range(4)},
    )

    def refusal(path: Path) -> str:
        return _model_of(path)

    return [
        Subject("GGUF", (gguf,), False, lambda: refusal(gguf)),
        Subject("LoRA", (lora,), False, lambda: refusal(lora)),
    ]
