"""Calibrate: record what blocks see in real use (method: paper, section 4.1).

Sources: pictures with captions (noised at timesteps over the whole schedule), in a folder or in tar
shards; pairs in shards that the teacher made; prompts alone and stored embeddings (the teacher draws;
states on its way are kept). An edit model's pictures come
with those that they were made from, the references: triples of reference, instruction and picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch

from ...algorithms.drawing import Drawing, draw_together, states_of
from ...algorithms.grouping import groups_within
from ...algorithms.saved_batches import SavedBatches
from ...architectures import Architecture, Inputs
from ...architectures.folded import folding_of
from ...data import sampling
from ...data.calibration import CLEAN, CalibrationSet, save_calibration
from ...data.codecs import open_codec
from ...data.codecs.base import Codec, check_references
from ...data.noised_batches import noised_batch, spread_timesteps
from ...data.picture_files import (
    caption_file,
    check_pictures,
    load_pictures,
    load_references,
    picture_files,
    reference_files,
)
from ...data.stored_embeddings import stored_prompts
from ...models.assembly import assemble
from ...models.layout import full_layout
from ...models.streaming import Teacher, block_loader, check_states
from ...models.weights import Weights
from ...run import Run
from ...settings.prune_settings import CalibrateConfig
from ...system.distributed import GRID_INPUT
from ...system.finite import checked_velocity
from ...system.json_text import json_text
from ...system.machine import DTYPES, resolve_device
from ...system.progress import Progress
from ..calibrated_shards import holds_pairs, pair_batches, unpacked


def calibrate(config: CalibrateConfig) -> Path:
    """Writes `calibration.safetensors`. Raises ValueError unless exactly one source is given."""
    sources = {
        "images": config.images,
        "references": None if config.images else config.references,
        "prompts": config.prompts,
        "embeddings": config.embeddings,
        "shards": config.shards or None,
    }
    given = [name for name, source in sources.items() if source is not None]
    if len(given) != 1:
        raise ValueError(
            "calibrate needs one source: --images (of an edit model with --references), --references alone, --prompts, "
            "--embeddings or --shards"
        )
    run, weights = Run(config.run), Weights(config.model)
    origin = {
        "architecture": weights.architecture.name,
        "fingerprint": weights.fingerprint,
        "seed": config.seed,
        "source": given[0],
    }
    values = {f.name: str(getattr(config, f.name)) for f in fields(config) if f.name != "run"}
    settings = json_text({**values, "fingerprint": weights.fingerprint})
    saved = SavedBatches(run.states / "calibrate", settings)
    save_calibration(run.calibration, CalibrationSet(_batches(config, weights, saved), origin))
    saved.remove()
    return run.calibration


def _batches(config: CalibrateConfig, weights: Weights, saved: SavedBatches) -> list[Inputs]:
    if config.shards and holds_pairs(config.shards):
        batches = pair_batches(config, weights, saved)
        _check_batch(config, weights, batches[0])
        return batches
    images = unpacked(config, saved) if config.shards else config.images
    if images:
        return _from_images(config, images, weights, saved)
    return _from_drawing(config, weights, saved)


def _from_images(
    config: CalibrateConfig, images: Path, weights: Weights, saved: SavedBatches
) -> list[Inputs]:
    """All captions first, then all pictures: the text encoder and the VAE are never in memory
    together."""
    codec = open_codec(config.model, resolve_device(config.device))
    check_references(codec.edits, config.references is not None, config.model)
    size = sampling.picture_size(codec, config.height, config.width)
    rows = picture_files(images)
    behind = _references(config, [path for path, _ in rows])
    check_pictures(path for path, _ in rows[: config.samples])
    check_pictures(path for row in behind[: config.samples] for path in row)
    generator = torch.Generator().manual_seed(config.seed)
    empty = torch.rand(config.samples, generator=generator) < config.empty_captions
    timesteps = spread_timesteps(config.samples, generator)
    chunks = _alike(config, behind)
    captions = [caption for _, caption in rows]

    def pictures(chunk: torch.Tensor) -> torch.Tensor | None:
        return (
            load_references([behind[i % len(rows)] for i in chunk.tolist()], size)
            if behind
            else None
        )

    shown = Progress(chunks, desc="captions", unit="batch")
    texts = [codec.text(_texts(captions, empty, chunk), pictures(chunk)) for chunk in shown]
    codec.release()
    batches = []
    for number, (chunk, text) in enumerate(
        zip(Progress(chunks, desc="calibrate", unit="batch"), texts, strict=True)
    ):
        noise_seed = int(torch.randint(2**62, (), generator=generator))
        paths = [rows[i % len(rows)][0] for i in chunk.tolist()]

        def make(paths=paths, chunk=chunk, text=text, noise_seed=noise_seed) -> Inputs:
            text = sampling.with_guidance(
                weights.architecture, weights.config, text, config.guidance
            )
            latents = codec.latents(load_pictures(paths, size))
            batch = noised_batch(weights.architecture, latents, timesteps[chunk], text, noise_seed)
            references = pictures(chunk)
            if references is None:
                return batch
            return _with_references(weights.architecture, codec, batch, references)

        batches.append(saved.done(number, make))
    codec.release()  # before the model comes
    _check_batch(config, weights, batches[0])
    return batches


def _check_batch(config: CalibrateConfig, weights: Weights, batch: Inputs) -> None:
    """As `_check_model`, a batch that has its clean pictures."""
    _check_model(config, weights, {name: t for name, t in batch.items() if name != CLEAN})


def _check_model(config: CalibrateConfig, weights: Weights, batch: Inputs) -> None:
    """Its first sample through the model, a block at a time. Raises ValueError naming the block
    from which on states are not finite."""
    teacher = Teacher(weights, DTYPES[config.dtype], resolve_device(config.device), streamed=True)
    sample = {name: tensor if name == GRID_INPUT else tensor[:1] for name, tensor in batch.items()}
    with torch.no_grad():
        state = teacher.embed(sample)
        for index, block in teacher.walk(0, teacher.num_blocks - 1):
            check_states(index, state)
            state = teacher.architecture.run_block(block, state)
        check_states(teacher.num_blocks, state)
        checked_velocity(teacher.architecture.finish(teacher.outer, state))


def _references(config: CalibrateConfig, pictures: list[Path]) -> list[list[Path]]:
    """The references of each picture; an empty list if the model draws from text alone."""
    return reference_files(config.references, pictures) if config.references else []


def _alike(config: CalibrateConfig, behind: list[list[Path]]) -> tuple[torch.Tensor, ...]:
    """Samples batch by batch, in each as many references; batches of every number are spread
    evenly, since later stages hold out the last ones."""
    counts = torch.tensor(
        [len(behind[i % len(behind)]) if behind else 0 for i in range(config.samples)]
    )
    groups = [torch.nonzero(counts == count)[:, 0].split(config.batch) for count in counts.unique()]
    placed = [
        ((position + 0.5) / len(group), chunk)
        for group in groups
        for position, chunk in enumerate(group)
    ]
    return tuple(chunk for _, chunk in sorted(placed, key=lambda pair: pair[0]))


def _with_references(
    architecture: Architecture, codec: Codec, batch: Inputs, pictures: torch.Tensor
) -> Inputs:
    tokens, grid = sampling.reference_tokens(architecture, codec, pictures)
    return {**batch, **tokens, "grid": torch.cat([batch["grid"], grid])}


def _from_drawing(config: CalibrateConfig, weights: Weights, saved: SavedBatches) -> list[Inputs]:
    """Text is encoded first and its encoder released, then the transformer comes."""
    device, architecture = resolve_device(config.device), weights.architecture
    generator = torch.Generator().manual_seed(config.seed)
    empty = torch.rand(config.samples, generator=generator) < config.empty_captions
    prompts = _prompts(config, weights, empty)
    kept_steps = torch.randint(config.steps, (config.samples,), generator=generator)
    drawings = []
    for chunk in _chunks(config.samples, config.batch):
        noise, rows = (
            torch.randn(len(chunk), *prompts.latent_shape, generator=generator),
            prompts.rows(chunk),
        )
        grid, tokens = rows.grid(architecture.grid(noise)), architecture.pack(noise)
        drawings.append(
            Drawing(prompts=rows, grid=grid, tokens=tokens, kept_steps=kept_steps[chunk])
        )
    folding = folding_of(weights.config)
    # a table asks its base file for whole schedules
    if config.streamed and not (folding and folding.form == "table"):
        teacher = Teacher(weights, DTYPES[config.dtype], device, streamed=True)
        return _drawn_together(config, teacher, saved, drawings)
    _check_model(config, weights, _first_sample(config, weights, prompts))
    load = block_loader(weights, DTYPES[config.dtype], device, config.streamed)
    model = assemble(
        weights, None, full_layout(weights.num_blocks), DTYPES[config.dtype], device, load
    )
    shown = Progress(drawings, desc="calibrate", unit="batch")
    return [
        saved.done(n, lambda d=d: _drawn(config, architecture, model, d))
        for n, d in enumerate(shown)
    ]


def _first_sample(config: CalibrateConfig, weights: Weights, prompts: sampling.Prompts) -> Inputs:
    """What a drawing of the first caption starts from."""
    architecture, first = weights.architecture, prompts.rows(torch.arange(1))
    noise = torch.randn(
        1, *prompts.latent_shape, generator=torch.Generator().manual_seed(config.seed)
    )
    text = sampling.with_guidance(architecture, weights.config, first.positive, config.guidance)
    return sampling.inputs_of(
        architecture.pack(noise), torch.ones(1), text, first.grid(architecture.grid(noise))
    )


def _drawn(config: CalibrateConfig, architecture: Architecture, model, drawing: Drawing) -> Inputs:
    """Draws a batch; of each picture one state on its way is kept, and the end as the clean one."""
    given = (
        drawing.tokens,
        drawing.grid,
        drawing.prompts,
        config.steps,
        config.guidance,
        drawing.seen,
    )
    drawing.tokens = sampling.draw(architecture, model, *given)
    return _as_inputs(config, architecture, model.config, drawing)


def _as_inputs(
    config: CalibrateConfig, architecture: Architecture, model_config, drawing: Drawing
) -> Inputs:
    text = sampling.with_guidance(
        architecture, model_config, drawing.prompts.positive, config.guidance
    )
    return sampling.inputs_of(drawing.kept, drawing.times, text, drawing.grid, drawing.tokens)


def _drawn_together(
    config: CalibrateConfig, teacher: Teacher, saved: SavedBatches, drawings: list[Drawing]
) -> list[Inputs]:
    """The same of as many batches at once as their states fit into memory."""
    groups = list(_fitting(config, teacher, drawings))
    each, done = config.steps * teacher.num_blocks, []
    with Progress(total=len(groups) * each, desc="calibrate", unit="block") as progress:
        for numbers in groups:
            group = [drawings[number] for number in numbers]
            if saved.have(numbers):
                progress.update(each)
            else:
                first = saved.restore(numbers, group)
                progress.update(first * teacher.num_blocks)
                keep = partial(saved.keep, numbers, group)
                draw_together(teacher, group, config.steps, config.guidance, first, progress, keep)
            make = partial(_as_inputs, config, teacher.architecture, teacher.config)
            done += [
                saved.done(n, partial(make, drawing))
                for n, drawing in zip(numbers, group, strict=True)
            ]
            saved.forget(numbers)
    return done


def _fitting(
    config: CalibrateConfig, teacher: Teacher, drawings: list[Drawing]
) -> Iterator[list[int]]:
    """Numbers of batches whose states lie in memory together, one at least."""
    sizes = [
        sum(
            state.image.nbytes + state.text.nbytes
            for state in states_of(teacher, drawing, 1.0, config.guidance)
        )
        for drawing in drawings
    ]
    return groups_within(
        config.cache_gb * 1e9,
        range(len(drawings)),
        lambda numbers: sum(sizes[number] for number in numbers),
    )


def _prompts(config: CalibrateConfig, weights: Weights, empty: torch.Tensor) -> sampling.Prompts:
    size = config.height, config.width
    if config.embeddings:
        path, architecture = config.embeddings, weights.architecture
        return stored_prompts(path, architecture, weights.config, empty, *size)
    codec = open_codec(config.model, resolve_device(config.device))
    samples = torch.arange(config.samples)
    if config.prompts:
        texts = _texts(caption_file(config.prompts), empty, samples)
        return sampling.encode_prompts(codec, texts, *size)
    rows = picture_files(config.references) if config.references else []
    texts = _texts([caption for _, caption in rows], empty, samples)
    references = [[rows[i % len(rows)][0]] for i in samples.tolist()]
    return sampling.encode_edits(weights.architecture, codec, texts, references, *size)


def _texts(captions: list[str], empty: torch.Tensor, samples: torch.Tensor) -> list[str]:
    """The caption of each sample, in turn, or "" where `empty` [all samples] says so."""
    return ["" if empty[i] else captions[i % len(captions)] for i in samples.tolist()]


def _chunks(count: int, size: int) -> tuple[torch.Tensor, ...]:
    return torch.arange(count).split(size)
