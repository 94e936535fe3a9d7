"""Evaluate: every variant against the teacher at the same seeds, with bootstrap intervals.

Measured are the velocity error on the calibration set by timestep; on pictures drawn from the same noise
PSNR of latents and pictures, SSIM, what a reader recognises in them, and how much the caption matters;
and time, memory and size. With a public benchmark, its prompts are drawn and judged instead.
"""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from ...algorithms.picture_metrics import psnr, ssim
from ...algorithms.resampling import mean_estimate, ratio_estimate, share_estimate, squares
from ...architectures import placed
from ...data.calibration import CalibrationSet
from ...data.codecs import open_codec
from ...data.codecs.table import TableCodec
from ...data.picture_files import caption_file, picture_files
from ...data.rendered.reader import Reading
from ...data.sampling import (
    Prompts,
    draw_prompts,
    encode_edits,
    encode_prompts,
    expanded,
    inputs_of,
    with_guidance,
)
from ...models.assembly import open_variant
from ...models.cost import CostModel
from ...models.streaming import block_loader
from ...models.weights import Weights
from ...plan import FULL, PruningPlan, Variant
from ...report.run_report import write_report
from ...run import Run
from ...settings.assess_settings import EvaluateConfig
from ...system.atomic import write_json
from ...system.finite import BAD_PICTURE, check_finite, checked_velocity
from ...system.machine import DTYPES, PeakMemory, resolve_device
from ...system.progress import Progress
from ...system.tensor_files import write_tensors
from ..benchmark import judge_benchmark
from ..inputs import open_calibration, open_plan
from ..run_students import RunStudents

SHOWN = 12
TIMESTEP_PARTS = 8
REPEATS = 15


def evaluate(config: EvaluateConfig) -> Path:
    """Writes `evaluate.json`, `pictures.safetensors` and the report. Returns the report's path."""
    return evaluate_with(config, seconds=None)


def evaluate_with(config: EvaluateConfig, seconds: Callable[[], float] | None) -> Path:
    """As `evaluate`. seconds(): how long the whole run took, for the report."""
    start = time.monotonic()
    run, weights = Run(config.run), Weights(config.model)
    plan = open_plan(config, weights)
    if config.benchmark != "none":
        reading, variants = reader_of(config, weights.path), _variants(config, plan)
        return judge_benchmark(config, weights, plan, variants, reading)
    if config.judge is not None:
        raise ValueError("--judge judges a benchmark's pictures; name it with --benchmark")
    calibration = open_calibration(config, weights)
    reading = reader_of(config, weights.path)
    texts, prompts = _prompts(config, weights, reading)
    comparison = _Comparison(config, run, weights, plan, calibration, reading, texts, prompts)
    variants = _variants(config, plan)
    rows = [comparison.row(variant) for variant in variants]
    comparison.time_again(variants, rows)
    write_json(
        run.evaluation,
        {
            "captions": len(texts),
            "steps": config.steps,
            "guidance": config.guidance,
            "seed": config.seed,
            "seconds": time.monotonic() - start,
            "device": resolve_device(config.device),
            "machine": f"{platform.machine()} {torch.get_num_threads()} threads",
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "captions_shown": texts[:SHOWN],
            "variants": rows,
        },
    )
    write_tensors(run.folder / "pictures.safetensors", comparison.shown)
    return write_report(run.folder, seconds() if seconds else None)


def _prompts(
    config: EvaluateConfig, weights: Weights, reading: Reading
) -> tuple[list[str], Prompts]:
    """The captions to draw, as text and encoded."""
    numbers, size = range(config.captions), (config.height, config.width)
    if config.references:
        rows = picture_files(config.references)
        pictures, texts = zip(*(rows[i % len(rows)] for i in numbers), strict=True)
        references = [[picture] for picture in pictures]
        return list(texts), encode_edits(
            weights.architecture, reading.codec, list(texts), references, *size
        )
    texts = (
        caption_file(config.prompts)
        if config.prompts
        else reading.captions(config.captions, config.seed)
    )
    texts = [texts[i % len(texts)] for i in numbers]
    return texts, encode_prompts(reading.codec, texts, *size)


def _variants(config: EvaluateConfig, plan: PruningPlan) -> list[Variant]:
    """The teacher first."""
    names = [n.strip() for n in config.variants.split(",") if n.strip()] or [
        v.name for v in plan.variants
    ]
    return [plan.variant(FULL)] + [plan.variant(name) for name in names if name != FULL]


class _Comparison:
    """Draws with one variant after the other; keeps what the teacher drew."""

    def __init__(
        self,
        config,
        run: Run,
        weights: Weights,
        plan,
        calibration: CalibrationSet,
        reading: Reading,
        texts: list[str],
        prompts: Prompts,
    ):
        self.config, self.weights, self.plan, self.calibration = config, weights, plan, calibration
        self.reading, self.texts, self.prompts = reading, texts, prompts
        self.device, self.dtype = resolve_device(config.device), DTYPES[config.dtype]
        self.students = RunStudents(run, weights.config, weights.architecture)
        self.cost = CostModel.at(weights.architecture, weights.config, calibration.inputs(0))
        self.shown: dict[str, torch.Tensor] = {}
        self.teacher: dict = {}

    def row(self, variant: Variant) -> dict:
        """The variant's figures, as evaluate.json has them. The first variant is the teacher."""
        ours = self._drawn(variant)
        gc.collect()  # frees the transformer before the VAE is loaded
        pictures = ours["pictures"] = self.reading.codec.pictures(ours["latents"])
        check_finite({"picture": pictures}, f"variant {variant.name!r}", BAD_PICTURE)
        self.reading.codec.release()
        self.shown[variant.name] = (pictures[:SHOWN] * 255).round().byte()
        if not self.teacher:
            self.teacher = ours
        cost = self.cost.variant(self.plan, variant)
        return {
            "name": variant.name,
            "parameters": cost.parameters,
            "bytes": cost.bytes,
            "flops": cost.flops,
            "seconds_per_step": ours["seconds"],
            "peak_memory_bytes": ours["peak"],
            **self._against_teacher(ours),
            **self._readings(pictures),
            "text_sensitivity": ours["text_sensitivity"],
        }

    def time_again(self, variants: list[Variant], rows: list[dict]) -> None:
        """Times the variants once more, the last one first; the better of both times counts, because a
        process gets faster as its allocator settles."""
        for variant, row in reversed(list(zip(variants, rows, strict=True))):
            row["seconds_per_step"] = min(
                row["seconds_per_step"], self._seconds(self._model(variant))
            )
        for row in rows:
            row["latency_ratio"] = rows[0]["seconds_per_step"] / row["seconds_per_step"]

    def _model(self, variant: Variant):
        load = block_loader(self.weights, self.dtype, self.device, self.config.streamed)
        return open_variant(
            self.weights, self.students, self.plan, variant, self.dtype, self.device, load
        )

    def _drawn(self, variant: Variant) -> dict:
        """Everything that needs the transformer. Nothing returned here refers to it, so that it can be
        freed; `peak` is the memory that it took."""
        memory = PeakMemory(self.device)
        model = self._model(variant)
        velocities = self._velocities(model, variant.name)
        latents = draw_prompts(
            self.weights.architecture,
            model,
            self.prompts,
            self.config.seed,
            self.config.steps,
            self.config.guidance,
            self.config.batch,
            f"draw {variant.name}",
        )
        return {
            "velocities": velocities,
            "seconds": self._seconds(model),
            "latents": latents,
            "peak": memory.above_start(),
            "text_sensitivity": self._text_sensitivity(model),
        }

    def _velocities(self, model, name: str) -> list[torch.Tensor]:
        """Predictions on the calibration set. Raises ValueError where one is not finite."""
        with torch.no_grad():
            batches = Progress(range(len(self.calibration)), desc=f"velocity {name}", unit="batch")
            return [
                checked_velocity(
                    self._forward(model, self.calibration.inputs(batch)), f"variant {name!r}"
                )
                for batch in batches
            ]

    def _forward(self, model, inputs) -> torch.Tensor:
        return (
            self.weights.architecture.call(model, placed(inputs, self.device, self.dtype))
            .float()
            .cpu()
        )

    def _seconds(self, model) -> float:
        """Median time of a forward of one calibration batch. Called after drawing, so caches are warm."""
        seconds = []
        with torch.no_grad():
            for _ in range(REPEATS):
                start = time.perf_counter()
                self._forward(model, self.calibration.inputs(0))
                seconds.append(time.perf_counter() - start)
        return sorted(seconds)[REPEATS // 2]

    def _against_teacher(self, ours: dict) -> dict:
        names = ("velocity_error", "velocity_error_by_timestep", "latent_psnr", "psnr", "ssim")
        if ours is self.teacher:
            return dict.fromkeys(names)
        pairs = list(zip(ours["velocities"], self.teacher["velocities"], strict=True))
        mean = partial(mean_estimate, seed=self.config.seed)
        error = torch.cat([squares(a - b) for a, b in pairs])
        power = torch.cat([squares(b) for _, b in pairs])
        return {
            "velocity_error": ratio_estimate(error, power, self.config.seed),
            "velocity_error_by_timestep": self._by_timestep(error, power),
            "latent_psnr": mean(psnr(ours["latents"], self.teacher["latents"], peak=None)),
            "psnr": mean(psnr(ours["pictures"], self.teacher["pictures"], peak=1.0)),
            "ssim": mean(ssim(ours["pictures"], self.teacher["pictures"])),
        }

    def _by_timestep(self, error: torch.Tensor, power: torch.Tensor) -> list[dict]:
        timesteps = torch.cat([batch["timestep"] for batch in self.calibration.batches])
        rows = []
        for part in range(TIMESTEP_PARTS):
            here = (timesteps * TIMESTEP_PARTS).long().clamp_max(TIMESTEP_PARTS - 1) == part
            if here.sum() > 1:
                rows.append(
                    {
                        "t": (part + 0.5) / TIMESTEP_PARTS,
                        **ratio_estimate(error[here], power[here], self.config.seed),
                    }
                )
        return rows

    def _readings(self, pictures: torch.Tensor) -> dict:
        scores = self.reading.score(pictures, self.texts)
        names = ("character", "shape", "colour")
        return {
            f"{name}_accuracy": share_estimate(scores[name]) if name in scores else None
            for name in names
        }

    def _text_sensitivity(self, model) -> dict:
        """|| v(caption) - v(empty) ||^2 / || v(caption) ||^2 at t = 0.7: how much the caption
        matters."""
        count = min(self.config.batch, self.prompts.count)
        generator = torch.Generator().manual_seed(self.config.seed)
        noise = self.weights.architecture.pack(
            torch.randn(count, *self.prompts.latent_shape, generator=generator)
        )
        prompts = self.prompts.rows(torch.arange(count))
        rows = (prompts.positive, expanded(prompts.negative, count))
        guide = partial(
            with_guidance,
            self.weights.architecture,
            self.weights.config,
            guidance=self.config.guidance,
        )
        grid = prompts.grid(
            self.weights.architecture.grid(torch.zeros(1, *self.prompts.latent_shape))
        )
        t = torch.full((count,), 0.7)
        with torch.no_grad():
            caption, empty = (
                self._forward(model, inputs_of(noise, t, guide(text), grid)) for text in rows
            )
        return ratio_estimate(squares(caption - empty), squares(caption), self.config.seed)


def reader_of(config: EvaluateConfig, model: Path) -> Reading:
    codec = open_codec(model, resolve_device(config.device))
    return Reading(codec, isinstance(codec, TableCodec))
