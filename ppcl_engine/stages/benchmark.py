"""A public benchmark: every variant draws its prompts, and a grader judges the pictures.

Everything is drawn before the judge is loaded, so that the two are never in memory together. A run
that was stopped goes on at the batch that was being drawn, or near the picture that was judged.
"""

from __future__ import annotations

import gc
import string
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from ..algorithms.judging import Grade, compared, grade, lost_most
from ..algorithms.saved_batches import SavedBatches
from ..architectures.modules import AnyModule
from ..data.benchmarks import BENCHMARKS
from ..data.benchmarks.items import Item, spread
from ..data.codecs.base import Codec
from ..data.graders import open_grader
from ..data.graders.base import Grader
from ..data.photos import read_picture
from ..data.rendered.reader import Reading
from ..data.sampling import Prompts, draw_rows, encode_prompts
from ..models.assembly import open_variant
from ..models.streaming import block_loader
from ..models.weights import Weights
from ..plan import PruningPlan, Variant
from ..report.benchmark_page import write_benchmark_page
from ..run import Run
from ..settings.assess_settings import EvaluateConfig
from ..system.atomic import read_object, replacing, write_json
from ..system.finite import BAD_PICTURE, check_finite
from ..system.hashes import text_hash
from ..system.json_text import json_text
from ..system.machine import DTYPES, resolve_device
from ..system.progress import Progress
from ..system.tensor_files import file_mark
from .run_students import RunStudents

SHOWN = 6  # prompts that lost most
SAVE_EVERY = 20  # pictures between two saves of what was judged
PLAIN = frozenset((string.ascii_letters + string.digits + "_-~").encode())
"""bytes that a folder's name may have everywhere"""


def judge_benchmark(
    config: EvaluateConfig,
    weights: Weights,
    plan: PruningPlan,
    variants: Sequence[Variant],
    reading: Reading,
) -> Path:
    """Writes `benchmarks/NAME.json` and the page of all benchmarks, whose path it returns.

    variants: the teacher first. Raises ValueError, before anything is drawn, where prompts or a
    grader are missing.
    """
    if config.prompts is None:
        files = BENCHMARKS[config.benchmark].files
        raise ValueError(f"--benchmark {config.benchmark} needs its own file: --prompts {files}")
    if config.references is not None:
        raise ValueError("benchmarks are drawn from text alone; leave --references out")
    if reading.codec.edits:
        raise ValueError(f"{config.model} is an edit model; benchmarks are drawn from text alone")
    every = BENCHMARKS[config.benchmark].items(config.prompts)
    items = spread(every, config.captions)
    needs = {item.needs for item in items}
    device = resolve_device(config.device)
    grader = open_grader(needs, config.judge, reading.has_reader, config.benchmark, device)
    run = Run(config.run)
    drawing = _Drawing(config, run, weights, plan, reading.codec, [item.prompt for item in items])
    pictures = {variant.name: drawing.pictures(variant) for variant in variants}
    grades = {name: _grades(items, paths, grader) for name, paths in pictures.items()}
    result = _result(config, len(every), items, grades, grader)
    write_json(run.benchmark(config.benchmark), result)
    return write_benchmark_page(run)


def _result(
    config: EvaluateConfig,
    available: int,
    items: list[Item],
    grades: dict[str, list[Grade]],
    grader: Grader,
) -> dict:
    scores = compared(grades, [item.category for item in items], config.seed)
    return {
        "benchmark": config.benchmark,
        "grader": grader.name,
        "prompts": len(items),
        "available": available,
        "steps": config.steps,
        "guidance": config.guidance,
        "seed": config.seed,
        "variants": [
            {"name": name, "folder": _folder_name(name), **score} for name, score in scores.items()
        ],
        "lost_most": [
            {
                "prompt": items[place].prompt,
                "picture": _picture_name(place),
                "shares": {
                    name: rows[place].earned / rows[place].possible for name, rows in grades.items()
                },
            }
            for place in lost_most(grades, SHOWN)
        ],
    }


def _folder_name(variant: str) -> str:
    """A name may have characters that a folder's cannot have everywhere."""
    return "".join(chr(b) if b in PLAIN else f"%{b:02X}" for b in variant.encode())


def _picture_name(place: int) -> str:
    return f"{place:05d}.png"


@dataclass
class _Drawing:
    """Draws a benchmark's prompts; pictures that are there already, and are still right, stay."""

    config: EvaluateConfig
    run: Run
    weights: Weights
    plan: PruningPlan
    codec: Codec
    texts: list[str]

    def pictures(self, variant: Variant) -> list[Path]:
        """The variant's pictures, in the order of the prompts."""
        pictures = self.run.benchmark(self.config.benchmark).with_suffix("")
        folder = pictures / _folder_name(variant.name)
        paths = [folder / _picture_name(place) for place in range(len(self.texts))]
        about, done = self._about(variant), folder / "drawn.json"
        if done.exists() and read_object(done) == about:
            return paths
        done.unlink(missing_ok=True)
        saved = SavedBatches(folder / "latents", json_text(about), "batch of pictures")
        batches = self._drawn(variant, saved)
        for rows, latents in zip(self._batches, batches, strict=True):
            drawn = self.codec.pictures(latents)
            check_finite({"picture": drawn}, f"variant {variant.name!r}", BAD_PICTURE)
            for place, picture in zip(rows.tolist(), drawn, strict=True):
                _save(paths[place], picture)
        self.codec.release()
        saved.remove()
        write_json(done, about)
        return paths

    def _drawn(self, variant: Variant, saved: SavedBatches) -> list[torch.Tensor]:
        """The latents of every batch. The transformer has left memory when they are returned."""
        _ = self._prompts  # encoded, and the text encoder released, before the transformer comes
        model, batches = self._model(variant), []
        shown = Progress(self._batches, desc=f"draw {variant.name}", unit="batch")
        for number, rows in enumerate(shown):
            drawn = saved.done(number, partial(self._latents, model, rows))
            batches.append(drawn["latents"])
        del model
        gc.collect()
        return batches

    def _model(self, variant: Variant) -> AnyModule:
        config, dtype = self.config, DTYPES[self.config.dtype]
        device = resolve_device(config.device)
        load = block_loader(self.weights, dtype, device, config.streamed)
        students = RunStudents(self.run, self.weights.config, self.weights.architecture)
        return open_variant(self.weights, students, self.plan, variant, dtype, device, load)

    def _latents(self, model: AnyModule, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        given = (rows, self.config.seed, self.config.steps, self.config.guidance)
        return {"latents": draw_rows(self.weights.architecture, model, self._prompts, *given)}

    @cached_property
    def _batches(self) -> tuple[torch.Tensor, ...]:
        return torch.arange(len(self.texts)).split(self.config.batch)

    @cached_property
    def _prompts(self) -> Prompts:
        return encode_prompts(self.codec, self.texts, self.config.height, self.config.width)

    def _about(self, variant: Variant) -> dict:
        """What decides a variant's pictures: with all of it unchanged, they are not drawn again."""
        names = ("seed", "steps", "guidance", "batch", "height", "width", "dtype")
        return {
            "prompts": text_hash("\n".join(self.texts)),
            "fingerprint": self.weights.fingerprint,
            "parts": [*variant.intervals, *variant.sites],
            "trained": [file_mark(path) for path in self._trained(variant)],
            **{name: getattr(self.config, name) for name in names},
        }

    def _trained(self, variant: Variant) -> Iterator[Path]:
        intervals = [self.run.student(name) for name in variant.intervals]
        projections = sorted(self.run.projections.glob("*.safetensors")) if variant.sites else []
        yield from (self.run.best(path) for path in (*intervals, *projections) if path.exists())
        if variant.tuned:
            yield self.run.tuned_variant(variant.name)


def _grades(items: Sequence[Item], pictures: Sequence[Path], grader: Grader) -> list[Grade]:
    """What the pictures earned; of a judging that was stopped, the rest is judged."""
    folder = pictures[0].parent
    about = {
        "drawn": read_object(folder / "drawn.json"),
        "grader": grader.name,
        "items": text_hash(json_text([asdict(item) for item in items])),
    }
    path = folder / "grades.json"
    kept = read_object(path) if path.exists() else {}
    grades = [Grade(**row) for row in kept["grades"]] if kept.get("about") == about else []
    left = list(zip(items, pictures, strict=True))[len(grades) :]
    for item, picture in Progress(left, desc=f"judge {folder.name}", unit="picture"):
        grades.append(grade(item, read_picture(picture), grader))
        if len(grades) % SAVE_EVERY == 0 or len(grades) == len(items):
            write_json(path, {"about": about, "grades": [asdict(row) for row in grades]})
    return grades


def _save(path: Path, picture: torch.Tensor) -> None:
    """Writes a picture [3, height, width] in [0, 1]."""
    from PIL import Image

    pixels = (picture * 255).round().byte().movedim(0, -1).contiguous().numpy()
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
