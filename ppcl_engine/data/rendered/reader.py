"""The reader: a small classifier that says what a picture of the rendered world shows.

Train it from a seed: `python -m ppcl_engine.data.rendered.reader --output reader.safetensors`.
It learns from rendered pictures only and never sees one that a teacher or student drew,
so it favours no model that it judges.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ...system.seeds import draw_generator
from ...system.tensor_files import write_tensors
from ..codecs.base import Codec
from ..codecs.table import TableCodec
from .captions import (
    CHARACTERS,
    COLOUR_NAMES,
    FIELDS,
    SHAPES,
    SIZE,
    Caption,
    caption_table,
    parse_caption,
    random_captions,
    render,
)
from .tables import fit_codec

BUNDLED = Path(__file__).with_name("reader.safetensors")
CLASSES = (len(CHARACTERS), len(COLOUR_NAMES), len(SHAPES), len(COLOUR_NAMES), len(COLOUR_NAMES))
COLOUR_FIELDS = ("character_colour", "shape_colour", "background")
READ_CHUNK = 500  # pictures a forward


@dataclass(frozen=True, kw_only=True)
class ReaderRecipe:
    """Training of the reader; the codec is the one that `fit_codec(codec_seed)` gives."""

    seed: int = 0
    codec_seed: int = 0
    steps: int = 1400
    batch: int = 128
    learning_rate: float = 3e-3
    warm_up: int = 50
    weight_decay: float = 0.02
    pixel_noise: float = 0.06
    latent_noise: float = 0.15
    brightness: float = 0.1
    warp: float = 1.2
    test_pictures: int = 4000


class CaptionReader(nn.Module):
    """Four convolutions and one linear layer a field; 0.3 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(3, 24, stride=2),
            *_convolution(24, 48, stride=2),
            *_convolution(48, 64, stride=1),
            *_convolution(64, 96, stride=2),
            nn.Flatten(),
        )
        self.heads = nn.ModuleDict(
            {field: nn.Linear(96 * 6 * 6, n) for field, n in zip(FIELDS, CLASSES, strict=True)}
        )

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pictures [n, 3, 48, 48] in [0, 1] -> logits [n, classes] for each of FIELDS."""
        features = self.features(pictures - 0.5)
        return {field: head(features) for field, head in self.heads.items()}


def _convolution(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()


def load_reader(path: Path = BUNDLED) -> CaptionReader:
    """The reader in `path`, fp32, in evaluation mode. Raises RuntimeError when a tensor is missing
    or unknown."""
    from safetensors.torch import load_file

    reader = CaptionReader()
    reader.load_state_dict(load_file(path))
    return reader.eval()


@torch.no_grad()
def read(reader: CaptionReader, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [n, 3, 48, 48] in [0, 1] -> int64 [n, 5], the likeliest class of each of FIELDS, in
    their order."""
    chunks = [reader(chunk) for chunk in pictures.split(READ_CHUNK)]
    return torch.cat(
        [torch.stack([logits[field].argmax(1) for field in FIELDS], dim=1) for logits in chunks]
    )


def score(readings: torch.Tensor, captions: list[Caption]) -> dict[str, torch.Tensor]:
    """Which of the readings [n, 5] agree with the captions.

    Returns bool [n] for "character", "shape" and "colour" (all three colours). Raises ValueError
    when the numbers of captions and readings differ.
    """
    if len(readings) != len(captions):
        raise ValueError(
            f"{len(readings)} readings cannot be scored against {len(captions)} captions; give one each"
        )
    right = readings.cpu() == caption_table(captions)
    columns = [FIELDS.index(field) for field in COLOUR_FIELDS]
    return {
        "character": right[:, FIELDS.index("character")],
        "shape": right[:, FIELDS.index("shape")],
        "colour": right[:, columns].all(dim=1),
    }


def training_batch(
    codec: TableCodec, recipe: ReaderRecipe, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augmented pictures [batch, 3, 48, 48] and their table [batch, 5]; depends only on (seed,
    step)."""
    generator = draw_generator(recipe.seed, step + 1)
    captions = random_captions(recipe.batch, generator)
    pictures = render(captions, generator)
    half = recipe.batch // 2
    latents = codec.latents(pictures[:half])
    latents += (
        recipe.latent_noise
        * _uniform(half, generator)
        * torch.randn(latents.shape, generator=generator)
    )
    pictures = torch.cat([codec.pictures(latents), pictures[half:]])
    return augment(pictures, recipe, generator), caption_table(captions)


def augment(
    pictures: torch.Tensor, recipe: ReaderRecipe, generator: torch.Generator
) -> torch.Tensor:
    """Warp, up to one pixel of blur, change of brightness and pixel noise, each of random strength
    for every picture.

    The warp is there because models get the form of a stroke wrong before anything else.
    """
    count = len(pictures)
    pictures = warped(pictures, recipe.warp * _uniform(count, generator), generator)
    pictures = torch.lerp(pictures, blurred(pictures), _uniform(count, generator))
    pictures = pictures * (1 + recipe.brightness * (2 * _uniform(count, generator) - 1))
    noise = torch.randn(pictures.shape, generator=generator)
    return (pictures + recipe.pixel_noise * _uniform(count, generator) * noise).clamp(0, 1)


def blurred(pictures: torch.Tensor) -> torch.Tensor:
    """Binomial blur (1, 2, 1) / 4 along both sides of [n, channels, h, w]."""
    weights = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = torch.outer(weights, weights).expand(pictures.shape[1], 1, 3, 3)
    return F.conv2d(
        F.pad(pictures, (1, 1, 1, 1), mode="replicate"), kernel, groups=pictures.shape[1]
    )


def warped(
    pictures: torch.Tensor, strength: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Moves pixels of [n, 3, 48, 48] by a smooth random field with 8x8 nodes; `strength` [n, 1, 1,
    1] in pixels."""
    moves = strength * torch.randn(len(pictures), 2, 8, 8, generator=generator) * 2 / SIZE
    field = F.interpolate(moves, size=(SIZE, SIZE), mode="bilinear").movedim(1, -1)
    still = F.affine_grid(
        torch.eye(2, 3).expand(len(pictures), 2, 3), list(pictures.shape), align_corners=False
    )
    return F.grid_sample(pictures, still + field, padding_mode="border", align_corners=False)


def _uniform(count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(count, 1, 1, 1, generator=generator)


def learning_rate(recipe: ReaderRecipe, step: int) -> float:
    """Linear warm-up, then cosine to zero."""
    warm = min(1.0, (step + 1) / recipe.warm_up)
    return recipe.learning_rate * warm * (1 + math.cos(math.pi * step / recipe.steps)) / 2


def train(recipe: ReaderRecipe, codec: TableCodec) -> CaptionReader:
    torch.manual_seed(recipe.seed)
    reader = CaptionReader().train()
    optimizer = torch.optim.AdamW(
        reader.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    start, losses = time.monotonic(), []
    for step in range(recipe.steps):
        pictures, table = training_batch(codec, recipe, step)
        logits = reader(pictures)
        losses_by_field = [
            F.cross_entropy(logits[field], table[:, column]) for column, field in enumerate(FIELDS)
        ]
        loss = reduce(torch.add, losses_by_field)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            rate = (step + 1) / (time.monotonic() - start)
            left = (recipe.steps - step - 1) / rate
            mean = sum(losses) / len(losses)
            print(
                f"step {step + 1}/{recipe.steps}  loss {mean:.4f}  {rate:.1f} steps/s  {left:.0f} s left",
                flush=True,
            )
            losses = []
    return reader.eval()


def accuracy(reader: CaptionReader, codec: TableCodec, seed: int, count: int) -> dict[str, float]:
    """The share that is read correctly in each of FIELDS, on `count` rendered pictures that went
    through the codec."""
    generator = draw_generator(seed)
    captions = random_captions(count, generator)
    readings = read(reader, codec.pictures(codec.latents(render(captions, generator))))
    shares = (readings == caption_table(captions)).double().mean(dim=0)
    return dict(zip(FIELDS, shares.tolist(), strict=True))


def save_reader(
    path: Path, reader: CaptionReader, recipe: ReaderRecipe, shares: dict[str, float]
) -> None:
    metadata = {
        "accuracy": json.dumps(shares),
        "recipe": json.dumps(asdict(recipe)),
        "license": "Apache-2.0",
    }
    write_tensors(path, _half(reader), metadata)


def _half(reader: CaptionReader) -> dict[str, torch.Tensor]:
    return {
        name: t.half() if t.is_floating_point() else t for name, t in reader.state_dict().items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--seed", type=int, default=ReaderRecipe.seed)
    options = parser.parse_args()
    recipe = ReaderRecipe(seed=options.seed)
    codec = fit_codec(recipe.codec_seed)
    reader = train(recipe, codec)
    reader.load_state_dict(_half(reader))  # judge the weights as they will be loaded
    shares = accuracy(reader, codec, recipe.seed + 1, recipe.test_pictures)
    save_reader(options.output, reader, recipe, shares)
    print(f"accuracy on {recipe.test_pictures} fresh rendered pictures through the codec:")
    for field, share in shares.items():
        print(f"  {field:<18}{share:8.3%}")


@dataclass(frozen=True)
class Reading:
    """A model's codec and, where the content of its pictures is known, captions for it and their
    score."""

    codec: Codec
    has_reader: bool

    def captions(self, count: int, seed: int) -> list[str]:
        """Raises ValueError for a model whose captions are not known."""
        if not self.has_reader:
            raise ValueError(
                "evaluate needs captions for this model; give --prompts, a text file with one a line"
            )
        generator = draw_generator(seed)
        return [caption.text() for caption in random_captions(count, generator)]

    def score(self, pictures: torch.Tensor, texts: list[str]) -> dict[str, torch.Tensor]:
        """Per picture: character, shape and colours right; empty for a model without a reader."""
        if not self.has_reader:
            return {}
        return score(read(load_reader(), pictures), [parse_caption(text) for text in texts])


if __name__ == "__main__":
    main()
