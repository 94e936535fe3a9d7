"""Sampling: captions are encoded, and a model draws their pictures with guided Euler steps on packed
latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from ..architectures import REFERENCES, Architecture, Inputs, placed
from ..architectures.folded import known_timesteps
from ..architectures.modules import AnyModule
from ..system.finite import checked_velocity
from ..system.progress import Progress
from ..system.seeds import draw_generator
from . import flow
from .calibration import CLEAN
from .codecs.base import Codec
from .picture_files import load_references

GUIDANCE = "guidance"

TextInputs = Inputs
"""what a transformer reads of n captions, by diffusers' names, one row each"""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Encoded captions, the empty caption, and how a picture is drawn: all that drawing needs of a
    codec."""

    positive: TextInputs
    """the captions"""
    negative: TextInputs
    """the empty caption: one row; of an edit model, which reads it with its references, one row for
    each caption"""
    latent_shape: tuple[int, int, int]
    """(channels, rows, columns)"""
    timesteps: Callable[[int, int], list[float]]
    """a `Codec`'s: (steps, image tokens) -> 1, ..., 0"""
    rescales_guidance: bool
    """a `Codec`'s: whether the guided velocity keeps the norm of the caption's"""
    references: torch.Tensor = field(default_factory=lambda: torch.empty(0, 3, dtype=torch.long))
    """`grid` [k, 3] of the references whose tokens come with the text"""

    @property
    def count(self) -> int:
        return len(self.positive["encoder_hidden_states"])

    def rows(self, rows: torch.Tensor) -> Prompts:
        """Only the captions `rows`."""
        positive = {name: tensor[rows] for name, tensor in self.positive.items()}
        negative = {
            name: tensor[rows] if len(tensor) > 1 else tensor
            for name, tensor in self.negative.items()
        }
        return replace(self, positive=positive, negative=negative)

    def grid(self, drawn: torch.Tensor) -> torch.Tensor:
        """[pictures, 3]: the picture to draw, [1, 3], and its references."""
        return torch.cat([drawn, self.references])


def inputs_of(tokens, t, text: TextInputs, grid, clean=None) -> Inputs:
    """A batch by diffusers' names: tokens [n, tokens, channels], t [n], text, grid [pictures,
    3]."""
    inputs = {"hidden_states": tokens, "timestep": t, **text, "grid": grid}
    return inputs if clean is None else {**inputs, CLEAN: clean}


def with_guidance(
    architecture: Architecture, config: Mapping, text: TextInputs, guidance: float
) -> TextInputs:
    """The text, with every row's guidance where the model itself reads it."""
    if not architecture.takes_guidance(config):
        return text
    return {**text, GUIDANCE: torch.full((len(text["encoder_hidden_states"]),), guidance)}


def draw(
    architecture: Architecture,
    model: AnyModule,
    noise: torch.Tensor,
    grid: torch.Tensor,
    prompts: Prompts,
    steps: int,
    guidance: float,
    seen: Callable[[int, torch.Tensor, float], None] = lambda step, x, t: None,
) -> torch.Tensor:
    """noise [n, tokens, channels] -> clean tokens of the n prompts; everything but the forward runs
    on the CPU.

    `seen` gets every step's number, its state and its t. A model that reads the guidance needs no
    empty caption. Raises ValueError naming the t at which the velocity is not finite.
    """
    texts = texts_of(architecture, model.config, prompts, len(noise), guidance)
    parameter = next(model.parameters())

    def velocity_of(x, t, text):
        inputs = inputs_of(x, torch.full((len(x),), t), text, grid)
        return (
            architecture.call(model, placed(inputs, parameter.device, parameter.dtype))
            .float()
            .cpu()
        )

    def velocity(x, t):
        guided = guided_velocity([velocity_of(x, t, text) for text in texts], guidance, prompts)
        return checked_velocity(guided, f"the model at t = {t:.3g}")

    timesteps = prompts.timesteps(steps, noise.shape[1])
    known_timesteps(model, timesteps[:-1])
    with torch.no_grad():
        return flow.euler(velocity, noise, timesteps, seen)


def texts_of(
    architecture: Architecture, config: Mapping, prompts: Prompts, count: int, guidance: float
) -> tuple[TextInputs, ...]:
    """What a model reads to draw `count` pictures: the captions, and the empty caption where
    guidance needs both."""
    positive = with_guidance(architecture, config, prompts.positive, guidance)
    return (
        (positive,)
        if guidance == 1 or GUIDANCE in positive
        else (positive, expanded(prompts.negative, count))
    )


def guided_velocity(
    velocities: list[torch.Tensor], guidance: float, prompts: Prompts
) -> torch.Tensor:
    """The guided velocity from the velocities for `texts_of`."""
    if len(velocities) == 1:
        return velocities[0]
    positive, negative = velocities
    guided = flow.guided(negative, positive, guidance)
    return flow.rescaled(guided, positive) if prompts.rescales_guidance else guided


def picture_size(codec: Codec, height: int, width: int) -> tuple[int, int]:
    """Height and width in pixels; 0 is the model's default. Raises ValueError for sizes that do not
    divide."""
    height, width, token = (
        height or codec.picture_size[0],
        width or codec.picture_size[1],
        2 * codec.pixels_per_latent,
    )
    if height % token or width % token:
        raise ValueError(
            f"{height} x {width} pixels is not a multiple of {token}; change --height and --width"
        )
    return height, width


def encode_prompts(codec: Codec, texts: list[str], height: int = 0, width: int = 0) -> Prompts:
    """Encoded captions. height, width: pixels, 0 is the model's default. Raises ValueError for
    sizes that do not divide.

    Encoding comes first and the codec is then released, so that the text encoder has left memory
    before the transformer is loaded.
    """
    prompts = prompts_of(
        codec, picture_size(codec, height, width), codec.text(texts), codec.text([""])
    )
    codec.release()
    return prompts


def encode_edits(
    architecture: Architecture,
    codec: Codec,
    texts: list[str],
    references: list[list[Path]],
    height: int = 0,
    width: int = 0,
) -> Prompts:
    """`encode_prompts` for instructions, each with the same number of references; all pictures are
    cropped to one size."""
    size = picture_size(codec, height, width)
    pictures = load_references(references, size)
    positive, negative = (codec.text(rows, pictures) for rows in (texts, [""] * len(texts)))
    codec.release()
    read, grid = reference_tokens(architecture, codec, pictures)
    codec.release()
    return replace(
        prompts_of(codec, size, {**positive, **read}, {**negative, **read}), references=grid
    )


def reference_tokens(
    architecture: Architecture, codec: Codec, pictures: torch.Tensor
) -> tuple[TextInputs, torch.Tensor]:
    """[n, k, 3, height, width] -> the tokens of the k references, one after the other, and their
    `grid` [k, 3]."""
    latents = codec.latents(pictures.flatten(0, 1))
    tokens = architecture.pack(latents).unflatten(0, pictures.shape[:2]).flatten(1, 2)
    return {REFERENCES: tokens}, architecture.grid(latents).expand(pictures.shape[1], 3)


def prompts_of(
    codec: Codec, size: tuple[int, int], positive: TextInputs, negative: TextInputs
) -> Prompts:
    """Prompts of captions that are encoded already; size: height and width in pixels."""
    rows, columns = (side // codec.pixels_per_latent for side in size)
    return Prompts(
        positive=positive,
        negative=negative,
        latent_shape=(codec.latent_channels, rows, columns),
        timesteps=codec.timesteps,
        rescales_guidance=codec.rescales_guidance,
    )


def draw_prompts(
    architecture: Architecture,
    model: torch.nn.Module,
    prompts: Prompts,
    seed: int,
    steps: int,
    guidance: float,
    batch: int,
    description: str,
) -> torch.Tensor:
    """Clean latents [n, channels, rows, columns] of all captions; picture i starts from the noise
    of (seed, i)."""
    batches = Progress(torch.arange(prompts.count).split(batch), desc=description, unit="batch")
    return torch.cat(
        [draw_rows(architecture, model, prompts, rows, seed, steps, guidance) for rows in batches]
    )


def draw_rows(
    architecture: Architecture,
    model: AnyModule,
    prompts: Prompts,
    rows: torch.Tensor,
    seed: int,
    steps: int,
    guidance: float,
    numbers: Sequence[int] | None = None,
) -> torch.Tensor:
    """As `draw_prompts`, the captions `rows` alone, together. numbers: of the pictures' noise, where
    they are not the rows'."""
    indices = rows.tolist() if numbers is None else numbers
    noise = torch.stack([seeded_noise(seed, i, prompts.latent_shape) for i in indices])
    grid, given = prompts.grid(architecture.grid(noise)), prompts.rows(rows)
    clean = draw(architecture, model, architecture.pack(noise), grid, given, steps, guidance)
    return architecture.unpack(clean, grid)


def seeded_noise(seed: int, index: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Latent noise of picture `index`; depends only on (seed, index), not on how pictures are
    batched."""
    generator = draw_generator(seed, index)
    return torch.randn(shape, generator=generator)


def expanded(text: TextInputs, count: int) -> TextInputs:
    """One caption, repeated for `count` rows."""
    return {name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in text.items()}
