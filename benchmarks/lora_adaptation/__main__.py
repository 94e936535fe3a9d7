"""What of a LoRA is lost on a pruned model, and how much of it adapting gives back.

Rank-8 LoRAs are trained on a whole bundled teacher: a style (colours inverted), a concept (a glyph
that it never drew), few steps (four, guidance in them). On the pruned model each is used as the file
is, adapted, and, as the bound, trained on the pruned model itself with the same recipe. Errors are of
the velocity against the teacher with the LoRA, relative to the change that the LoRA makes, on
samples of the LoRA's own task that nothing was trained on; and of the pictures drawn from the same
noise. `regained` is (as it is - adapted) / (as it is - trained on it); intervals are 95 % bootstrap over samples.
Rows that are done are read from `runs/lora_adaptation`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ppcl_engine.algorithms.resampling import ratio_estimate, squares
from ppcl_engine.data.calibration import CalibrationSet, save_calibration
from ppcl_engine.data.codecs import open_codec
from ppcl_engine.data.codecs.table import TableCodec
from ppcl_engine.data.rendered.captions import random_captions
from ppcl_engine.data.sampling import draw_prompts, encode_prompts
from ppcl_engine.demo.bundled import bundled
from ppcl_engine.demo.run import LEARNING_RATE
from ppcl_engine.models.assembly import open_variant
from ppcl_engine.models.bundle import Bundle
from ppcl_engine.models.lora_writing import ADAPTED
from ppcl_engine.models.opening import open_model
from ppcl_engine.models.weights import Weights
from ppcl_engine.plan import PruningPlan, Variant, parse_intervals
from ppcl_engine.run import Run
from ppcl_engine.settings.convert_settings import AdaptLoraConfig
from ppcl_engine.settings.prune_settings import DistillDepthConfig
from ppcl_engine.stages.convert.adapt_lora import adapt_lora
from ppcl_engine.stages.prune.distill_depth import distill_depth
from ppcl_engine.stages.run_students import RunStudents
from ppcl_engine.system.atomic import read_json, write_json, write_text
from ppcl_engine.system.tensor_files import TensorFile, write_tensors

from ..shared import output, teachers
from ..shared.pruned_demo import DEMO
from .training import FEW_STEPS, GUIDANCE, TASKS, World, add_lora, trained_lora

SAMPLES, CALIBRATION, SEED = 96, 96, 11
STEPS = {"inverted": 10, "glyph": 10, "few_steps": FEW_STEPS}
FLUX_INTERVALS = "2-3 5-6 10-12 15-17"
MEASURES = ("velocity", "pictures")
USES = ("as it is", "adapted", "trained on it")


@dataclass(frozen=True)
class Pruned:
    """A teacher, and the run of its pruned model."""

    name: str
    path: Path
    run: Run
    plan: PruningPlan
    variant: Variant
    world: World

    def model(self) -> nn.Module:
        weights = Weights(self.path)
        students = RunStudents(self.run, weights.config, weights.architecture)
        model = open_variant(weights, students, self.plan, self.variant, torch.float32, "cpu")
        return model.requires_grad_(False).eval()

    def teacher(self) -> nn.Module:
        return open_model(self.path).requires_grad_(False).eval()


def pruned(name: str, folder: Path, chosen) -> Pruned:
    path = bundled(name)
    weights, run = Weights(path), Run(folder / name)
    if not run.calibration.exists():
        samples = 16 if chosen.quick else CALIBRATION
        save_calibration(
            run.calibration, teachers.rendered(path, weights, samples, min(16, samples), seed=0)
        )
    if name == "qwen":
        bundle = Bundle(DEMO)
        if not run.plan.exists():
            for interval in bundle.plan.intervals:
                state = bundle.student(interval, torch.float32, "cpu").state_dict()
                write_tensors(
                    run.student(interval.name), {f"weight.{n}": t for n, t in state.items()}
                )
            depth = bundle.plan.with_parts(sites=(), variants=())
            write_text(run.plan, depth.to_json())
    elif not run.students.exists() or len(list(run.students.iterdir())) < 4:
        if not run.plan.exists():
            write_text(run.plan, _flux_plan(weights).to_json())
        rounds, updates = (1, 2) if chosen.quick else (4, 40)
        common = {"model": path, "run": run.folder, "device": "cpu"}
        training = {"rounds": rounds, "updates": updates, "learning_rate": LEARNING_RATE}
        distill_depth(DistillDepthConfig(**common, **training))
    plan, codec = run.load_plan(), open_codec(path)
    assert isinstance(codec, TableCodec)
    world = World(weights.architecture, open_model(path).requires_grad_(False).eval(), codec)
    return Pruned(name, path, run, plan, plan.everything(), world)


def _flux_plan(weights: Weights) -> PruningPlan:
    return PruningPlan(
        architecture=weights.architecture.name,
        config=weights.config,
        num_blocks=weights.num_blocks,
        fingerprint=weights.fingerprint,
        intervals=parse_intervals(FLUX_INTERVALS),
    )


def task_calibration(subject: Pruned, task: str, chosen) -> CalibrationSet:
    """Samples of the LoRA's own use: its pictures, or the timesteps of its few steps."""
    count = 16 if chosen.quick else CALIBRATION
    batches = [TASKS[task](subject.world, 200, n, 16)[0] for n in range(count // 16)]
    return CalibrationSet(batches, teachers.origin(Weights(subject.path)))


def measure(subject: Pruned, task: str, chosen) -> dict:
    """One teacher and LoRA."""
    folder = subject.run.folder
    path = folder / f"{task}_{chosen.steps}_{chosen.updates}.json"
    if path.exists():
        return read_json(path)
    start, steps = time.monotonic(), chosen.steps
    whole = trained_lora(
        folder / f"{task}_{steps}.safetensors",
        subject.world,
        subject.teacher(),
        task,
        steps,
        chosen.batch,
    )
    direct = trained_lora(
        folder / f"{task}_{steps}_direct.safetensors",
        subject.world,
        subject.model(),
        task,
        steps,
        chosen.batch,
    )
    adapting = Run(folder / f"adapting_{task}_{steps}_{chosen.updates}")
    if not adapting.plan.exists():
        save_calibration(adapting.calibration, task_calibration(subject, task, chosen))
        adapting.students.symlink_to(subject.run.students.absolute())
        write_text(adapting.plan, subject.plan.to_json())
    began = time.monotonic()
    adapted = adapt_lora(
        AdaptLoraConfig(
            model=subject.path,
            run=adapting.folder,
            lora=whole,
            variant="all",
            device="cpu",
            updates=chosen.updates,
        )
    )
    seconds = time.monotonic() - began
    files = dict(zip(USES, (whole, adapted, direct), strict=True))
    places = TensorFile(adapted).about(ADAPTED)["losses"]
    values = {"teacher": subject.name, "lora": task, "adapting_seconds": seconds, "places": places}
    values |= compared(subject, task, whole, files, chosen)
    write_json(path, {**values, "seconds": time.monotonic() - start})
    return read_json(path)


@torch.no_grad()
def compared(subject: Pruned, task: str, whole: Path, files: dict[str, Path], chosen) -> dict:
    """Errors against the teacher with the LoRA, of each use and of the pruned model's own without."""
    goal, plain = add_lora(subject.teacher(), whole), subject.teacher()
    reads = {
        "velocity": lambda model: _velocities(subject, model, task, chosen),
        "pictures": lambda model: _pictures(subject, model, task, chosen),
    }
    found = {}
    for measure_name, read in reads.items():
        wanted = read(goal)
        change = squares(wanted - read(plain))
        own = squares(read(subject.model()) - read(plain))
        errors = {u: squares(read(add_lora(subject.model(), f)) - wanted) for u, f in files.items()}
        found[measure_name] = _row(errors, change, own)
    return found


def _row(errors: dict[str, torch.Tensor], change: torch.Tensor, own: torch.Tensor) -> dict:
    as_it_is, adapted, direct = (errors[use] for use in USES)
    return {
        "errors": {use: ratio_estimate(error, change, SEED) for use, error in errors.items()},
        "pruned alone": ratio_estimate(own, change, SEED),
        "regained": ratio_estimate(as_it_is - adapted, as_it_is - direct, SEED),
    }


def _velocities(subject: Pruned, model: nn.Module, task: str, chosen) -> torch.Tensor:
    count = 16 if chosen.quick else SAMPLES
    batches = [TASKS[task](subject.world, 300, n, 16)[0] for n in range(count // 16)]
    return torch.cat([subject.world.architecture.call(model, inputs) for inputs in batches])


def _pictures(subject: Pruned, model: nn.Module, task: str, chosen) -> torch.Tensor:
    texts = [
        c.text() for c in random_captions(chosen.captions, torch.Generator().manual_seed(SEED))
    ]
    prompts = encode_prompts(subject.world.codec, texts)
    steps = 1 if chosen.quick else STEPS[task]
    guidance = 1.0 if task == "few_steps" else GUIDANCE
    return draw_prompts(
        subject.world.architecture, model, prompts, SEED, steps, guidance, 16, "draw"
    )


def table(rows: list[dict]) -> None:
    lines = []
    for row in rows:
        for name in MEASURES:
            values = row[name]
            cells = [_cell(values["errors"][use]) for use in USES]
            lines.append(
                (f"{row['teacher']}, {row['lora']}, {name}", *cells, _cell(values["regained"], 100))
            )
    output.print_table("error relative to the LoRA's change", ("", *USES, "regained %"), lines)


def _cell(value: dict, times: float = 1.0) -> str:
    middle, low, high = (times * value[key] for key in ("value", "low", "high"))
    digits = 0 if times > 1 else 3
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main(arguments: list[str] | None = None) -> Path:
    parser = output.options("lora_adaptation", __doc__ or "")
    parser.add_argument("--teachers", default="qwen flux")
    parser.add_argument("--loras", default=" ".join(TASKS))
    parser.add_argument("--steps", type=int, default=300, help="of a LoRA's training")
    parser.add_argument("--batch", type=int, default=16, help="pictures in a step of it")
    parser.add_argument("--updates", type=int, default=200, help="of a place's pairs")
    parser.add_argument("--captions", type=int, default=48, help="pictures drawn a row")
    parser.add_argument("--work", type=Path, default=Path("runs/lora_adaptation"))
    chosen = output.parse(parser, arguments)
    if chosen.quick:
        chosen.steps, chosen.updates, chosen.captions, chosen.batch = 2, 2, 4, 4
        chosen.work = chosen.work.with_name("lora_adaptation_quick")
    rows, path = [], chosen.output
    for name in chosen.teachers.split():
        subject = pruned(name, chosen.work, chosen)
        for task in chosen.loras.split():
            rows.append(measure(subject, task, chosen))
            table(rows)
            settings = {n: getattr(chosen, n) for n in ("steps", "batch", "updates", "captions")}
            path = output.write("lora_adaptation", chosen, {"rows": rows, **settings})
    return path


if __name__ == "__main__":
    main()
