"""Make data: the teacher draws captions; the latents of its pictures and what it reads of the captions
go into tar shards, which calibrate reads (the paper trains on such pictures of its teacher).

All captions are encoded before the transformer comes. Shards that are there stay, so a stopped run
goes on at the shard that was being drawn; several processes share the shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ...architectures import Inputs
from ...architectures.modules import AnyModule
from ...data.codecs import open_codec
from ...data.codecs.base import Codec, check_references
from ...data.pairs import EMPTY, LATENTS, caption_tensors, joined_captions, pair_sample
from ...data.picture_files import caption_file
from ...data.sampling import Prompts, draw_rows, picture_size, prompts_of
from ...data.shards import Sample, write_shard
from ...models.assembly import assemble
from ...models.layout import full_layout
from ...models.streaming import block_loader
from ...models.weights import Weights
from ...settings.prune_settings import DataConfig
from ...system.atomic import read_object, write_json
from ...system.distributed import processes
from ...system.finite import check_finite
from ...system.hashes import text_hash
from ...system.json_text import json_text
from ...system.machine import DTYPES, resolve_device
from ...system.outputs import check_folder
from ...system.progress import Progress
from ...system.tensor_files import TensorFile, write_tensors

ABOUT, MARK = "pairs.json", "made"
"""how the shards were made; where a file of captions has its hash"""
BAD_TEXT = "the text encoder's weights are damaged: download the model's folder again"


def make_data(config: DataConfig) -> Path:
    """Writes the shards. Returns the pattern that names all of them. Raises ValueError where the folder
    holds shards that were made otherwise."""
    check_folder(config.out)
    texts, weights = caption_file(config.prompts), Weights(config.teacher)
    codec = open_codec(config.teacher, resolve_device(config.device))
    check_references(codec.edits, False, config.teacher)
    mark = _checked_mark(config, weights, texts)
    shards = _shards(config, texts)
    left = [shard for shard in processes().own(shards) if not shard.path.exists()]
    _encode(config, weights, codec, left, mark)
    codec.release()
    if left:
        model = _open_model(config, weights)
        for shard in Progress(left, desc="draw shards", unit="shard"):
            write_shard(shard.path, _drawn(config, weights, codec, model, shard))
            shard.captions.unlink()
    return config.out / f"{{{_name(0)}..{_name(len(shards) - 1)}}}.tar"


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """A shard: captions that stand together."""

    path: Path
    first: int
    """place of its first caption among all"""
    texts: list[str]

    @property
    def captions(self) -> Path:
        """Its encoded captions, until it is drawn."""
        return self.path.with_name(f"{self.path.stem}_captions.safetensors")


def _shards(config: DataConfig, texts: list[str]) -> list[_Shard]:
    return [
        _Shard(
            path=config.out / f"{_name(number)}.tar",
            first=first,
            texts=texts[first : first + config.shard],
        )
        for number, first in enumerate(range(0, len(texts), config.shard))
    ]


def _name(number: int) -> str:
    return f"{number:05d}"


def _checked_mark(config: DataConfig, weights: Weights, texts: list[str]) -> str:
    """A hash of what decides the shards, which is kept beside them. Raises ValueError naming a setting
    that differs from that of shards that are there."""
    names = ("seed", "steps", "guidance", "height", "width", "dtype", "store", "shard")
    about = {
        "prompts": text_hash("\n".join(texts)),
        "teacher": weights.fingerprint,
        **{name: getattr(config, name) for name in names},
    }
    path = config.out / ABOUT
    before = read_object(path) if path.exists() else {}
    changed = [name for name, value in about.items() if before.get(name) != value]
    if changed and any(config.out.glob("*.tar")):
        raise ValueError(
            f"{config.out} holds shards that were made otherwise ({changed[0]} differs); give another --out, "
            "or the same settings to go on"
        )
    if changed:
        write_json(path, about)
    return text_hash(json_text(about))


def _encode(
    config: DataConfig, weights: Weights, codec: Codec, shards: list[_Shard], mark: str
) -> None:
    """Leaves the captions of every shard, and the empty caption, in files with this mark."""
    architecture, kept = weights.architecture, DTYPES[config.store]

    def is_there(path: Path) -> bool:
        return path.exists() and TensorFile(path).metadata.get(MARK) == mark

    def write(path: Path, tensors: Inputs) -> None:
        check_finite(tensors, path.name, BAD_TEXT)
        stored = {name: tensor.to(kept) for name, tensor in tensors.items()}
        write_tensors(path, stored, {MARK: mark})

    if not is_there(config.out / EMPTY):
        write(config.out / EMPTY, caption_tensors(architecture, codec.text([""]), 0))
    todo = [shard for shard in shards if not is_there(shard.captions)]
    for shard in Progress(todo, desc="captions", unit="shard"):
        text = codec.text(shard.texts)
        rows = [caption_tensors(architecture, text, row) for row in range(len(shard.texts))]
        named = {
            f"{number}.{name}": t for number, row in enumerate(rows) for name, t in row.items()
        }
        write(shard.captions, named)


def _open_model(config: DataConfig, weights: Weights) -> AnyModule:
    dtype, device = DTYPES[config.dtype], resolve_device(config.device)
    load = block_loader(weights, dtype, device, config.streamed)
    return assemble(weights, None, full_layout(weights.num_blocks), dtype, device, load)


def _drawn(
    config: DataConfig, weights: Weights, codec: Codec, model: AnyModule, shard: _Shard
) -> Iterator[tuple[str, Sample]]:
    """(name, files) of the shard's pairs. A picture's noise depends on its caption's place in the whole
    file, not on how captions are cut into shards and batches."""
    captions = _captions(shard)
    for rows in torch.arange(len(captions)).split(config.batch):
        given = [captions[row] for row in rows.tolist()]
        prompts = _prompts(config, weights, codec, given)
        numbers = rows + shard.first
        how = (config.seed, config.steps, config.guidance)
        latents = draw_rows(
            weights.architecture, model, prompts, torch.arange(len(rows)), *how, numbers.tolist()
        )
        check_finite({LATENTS: latents}, shard.path, "check the model")
        for number, latent, caption in zip(numbers.tolist(), latents, given, strict=True):
            text = shard.texts[number - shard.first]
            yield f"{number:09d}", pair_sample(latent, caption, text)


def _captions(shard: _Shard) -> list[Inputs]:
    """What `_encode` left, a caption each."""
    file = TensorFile(shard.captions)
    rows: list[Inputs] = [{} for _ in shard.texts]
    for key in file.keys():
        number, _, name = key.partition(".")
        rows[int(number)][name] = file.read(key)
    return rows


def _prompts(config: DataConfig, weights: Weights, codec: Codec, given: list[Inputs]) -> Prompts:
    empty = TensorFile(config.out / EMPTY).read_all()
    positive, negative = (joined_captions(weights.architecture, rows) for rows in (given, [empty]))
    return prompts_of(codec, picture_size(codec, config.height, config.width), positive, negative)
