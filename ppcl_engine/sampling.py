"""Draw with a model: guided Euler sampling of packed latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from . import flow
from .architectures import Architecture, Inputs
from .codecs import Codec
from .data import CLEAN

Text = tuple[torch.Tensor, torch.Tensor]
"""embeddings [n, tokens, width] and mask [n, tokens]"""


def inputs_of(tokens, t, text, mask, grid, clean=None) -> Inputs:
    """A batch by diffusers' names: tokens [n, tokens, channels], t [n], text and mask, grid [pictures, 3]."""
    inputs = {
        "hidden_states": tokens,
        "timestep": t,
        "encoder_hidden_states": text.float(),
        "encoder_hidden_states_mask": mask,
        "grid": grid,
    }
    return inputs if clean is None else {**inputs, CLEAN: clean}


def draw(
    architecture: Architecture,
    model: torch.nn.Module,
    noise: torch.Tensor,
    grid: torch.Tensor,
    given: Text,
    nothing: Text,
    steps: int,
    guidance: float,
    seen: Callable[[torch.Tensor, float], None] = lambda x, t: None,
) -> torch.Tensor:
    """noise [n, tokens, channels] -> clean tokens; `given` are the captions, `nothing` the empty one,
    both with n rows. All on the CPU but the forward itself. `seen` is shown every state and its t."""
    parameter = next(model.parameters())

    def velocity_of(x, t, text, mask):
        inputs = inputs_of(x, torch.full((len(x),), t), text, mask, grid)
        placed = {k: v if k == "grid" else v.to(parameter.device) for k, v in inputs.items()}
        for key in ("hidden_states", "encoder_hidden_states"):
            placed[key] = placed[key].to(parameter.dtype)
        return architecture.call(model, placed).float().cpu()

    def velocity(x, t):
        caption = velocity_of(x, t, *given)
        return caption if guidance == 1 else flow.guided(velocity_of(x, t, *nothing), caption, guidance)

    with torch.no_grad():
        return flow.euler(velocity, noise, steps, seen)


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Encoded captions, the empty one, and the latents' shape: all that drawing needs of a codec."""

    given: Text
    nothing: Text
    latent_shape: tuple[int, int, int]

    @property
    def count(self) -> int:
        return len(self.given[0])


def encode_prompts(codec: Codec, texts: list[str], height: int = 0, width: int = 0) -> Prompts:
    """height, width: pixels, 0 is the model's default. Raises ValueError for sizes that do not divide.

    Encoding comes first and alone, so that a text encoder can leave memory before the transformer comes.
    """
    text, mask = codec.text(texts)
    empty, empty_mask = codec.text([""])
    height, width, pixels = height or codec.picture_size[0], width or codec.picture_size[1], codec.pixels_per_latent
    if height % (2 * pixels) or width % (2 * pixels):
        raise ValueError(f"{height} x {width} pixels is not a multiple of {2 * pixels}; change --height and --width")
    shape = (codec.latent_channels, height // pixels, width // pixels)
    return Prompts(given=(text.cpu(), mask.cpu()), nothing=(empty.cpu(), empty_mask.cpu()), latent_shape=shape)


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
    for rows in tqdm(torch.arange(prompts.count).split(batch), desc=description, unit="batch"):
        noise = torch.stack([seeded_noise(seed, i, prompts.latent_shape) for i in rows.tolist()])
        grid = architecture.grid(noise)
        given, nothing = rows_of(prompts.given, rows), expanded(prompts.nothing, len(rows))
        clean = draw(architecture, model, architecture.pack(noise), grid, given, nothing, steps, guidance)
        latents.append(architecture.unpack(clean, grid))
    return torch.cat(latents)


def seeded_noise(seed: int, index: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Latent noise of picture `index`: depends on (seed, index) alone, not on how pictures are batched."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
    return torch.randn(shape, generator=generator)


def expanded(text: Text, count: int) -> Text:
    """One caption's embeddings for `count` rows."""
    return text[0].expand(count, -1, -1), text[1].expand(count, -1)


def rows_of(text: Text, rows: torch.Tensor) -> Text:
    return text[0][rows], text[1][rows]
