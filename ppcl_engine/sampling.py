"""Draw with a model: guided Euler sampling of packed latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from . import flow
from .architectures import Architecture, Inputs, placed
from .codecs import Codec
from .data import CLEAN
from .folding_tables import known_timesteps
from .progress import Progress

GUIDANCE = "guidance"

Text = Inputs
"""what a transformer reads of n captions, by diffusers' names: a row each"""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Encoded captions, the empty one (one row), and how a picture is drawn: all that drawing needs of a codec."""

    given: Text
    nothing: Text
    latent_shape: tuple[int, int, int]
    timesteps: Callable[[int, int], list[float]]
    """a `Codec`'s: (steps, image tokens) -> 1, ..., 0"""
    rescales_guidance: bool

    @property
    def count(self) -> int:
        return len(self.given["encoder_hidden_states"])

    def rows(self, rows: torch.Tensor) -> Prompts:
        """The captions `rows` alone."""
        return replace(self, given={name: tensor[rows] for name, tensor in self.given.items()})


def inputs_of(tokens, t, text: Text, grid, clean=None) -> Inputs:
    """A batch by diffusers' names: tokens [n, tokens, channels], t [n], text, grid [pictures, 3]."""
    inputs = {"hidden_states": tokens, "timestep": t, **text, "grid": grid}
    return inputs if clean is None else {**inputs, CLEAN: clean}


def with_guidance(architecture: Architecture, config: Mapping, text: Text, guidance: float) -> Text:
    """The text, and the guidance of every row where the model itself reads it."""
    if not architecture.takes_guidance(config):
        return text
    return {**text, GUIDANCE: torch.full((len(text["encoder_hidden_states"]),), guidance)}


def draw(
    architecture: Architecture,
    model: torch.nn.Module,
    noise: torch.Tensor,
    grid: torch.Tensor,
    prompts: Prompts,
    steps: int,
    guidance: float,
    seen: Callable[[int, torch.Tensor, float], None] = lambda step, x, t: None,
) -> torch.Tensor:
    """noise [n, tokens, channels] -> clean tokens of the n prompts. All on the CPU but the forward itself.
    `seen` is shown every step's number, its state and its t. A model that reads the guidance needs no empty caption."""
    given, nothing = (
        with_guidance(architecture, model.config, prompts.given, guidance),
        expanded(prompts.nothing, len(noise)),
    )
    parameter = next(model.parameters())

    def velocity_of(x, t, text):
        inputs = inputs_of(x, torch.full((len(x),), t), text, grid)
        return architecture.call(model, placed(inputs, parameter.device, parameter.dtype)).float().cpu()

    def velocity(x, t):
        caption = velocity_of(x, t, given)
        if guidance == 1 or GUIDANCE in given:
            return caption
        guided = flow.guided(velocity_of(x, t, nothing), caption, guidance)
        return flow.rescaled(guided, caption) if prompts.rescales_guidance else guided

    timesteps = prompts.timesteps(steps, noise.shape[1])
    known_timesteps(model, timesteps[:-1])
    with torch.no_grad():
        return flow.euler(velocity, noise, timesteps, seen)


def picture_size(codec: Codec, height: int, width: int) -> tuple[int, int]:
    """Height and width in pixels; 0 is the model's default. Raises ValueError for sizes that do not divide."""
    height, width, token = height or codec.picture_size[0], width or codec.picture_size[1], 2 * codec.pixels_per_latent
    if height % token or width % token:
        raise ValueError(f"{height} x {width} pixels is not a multiple of {token}; change --height and --width")
    return height, width


def encode_prompts(codec: Codec, texts: list[str], height: int = 0, width: int = 0) -> Prompts:
    """height, width: pixels, 0 is the model's default. Raises ValueError for sizes that do not divide.

    Encoding comes first and alone, and the codec is released, so that the text encoder has left
    memory before the transformer comes.
    """
    rows, columns = (side // codec.pixels_per_latent for side in picture_size(codec, height, width))
    prompts = Prompts(
        given=codec.text(texts),
        nothing=codec.text([""]),
        latent_shape=(codec.latent_channels, rows, columns),
        timesteps=codec.timesteps,
        rescales_guidance=codec.rescales_guidance,
    )
    codec.release()
    return prompts


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
    """Clean latents [n, channels, rows, columns] of all captions; picture i starts from (seed, i)'s noise."""
    latents = []
    for rows in Progress(torch.arange(prompts.count).split(batch), desc=description, unit="batch"):
        noise = torch.stack([seeded_noise(seed, i, prompts.latent_shape) for i in rows.tolist()])
        grid = architecture.grid(noise)
        clean = draw(architecture, model, architecture.pack(noise), grid, prompts.rows(rows), steps, guidance)
        latents.append(architecture.unpack(clean, grid))
    return torch.cat(latents)


def seeded_noise(seed: int, index: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Latent noise of picture `index`: depends on (seed, index) alone, not on how pictures are batched."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return torch.randn(shape, generator=generator)


def expanded(text: Text, count: int) -> Text:
    """One caption for `count` rows."""
    return {name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in text.items()}
