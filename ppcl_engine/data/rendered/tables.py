"""The tables of a bundled teacher: a principal component analysis of 4x4 pixel blocks, and one
random embedding for each word.

They are stored in the teacher's own file and used through `codecs.table.TableCodec`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..codecs.table import TableCodec
from .captions import CHARACTERS, COLOUR_NAMES, SHAPES, random_captions, render

CHANNELS = 16
BLOCK = 4  # pixels a latent position covers
TEXT_WIDTH = 64
CAPTION_WORDS = 9  # of `Caption.text`
VOCABULARY = ("<empty>", "a", "on", "background", *COLOUR_NAMES, *SHAPES, *CHARACTERS)


def fit_codec(seed: int, positions: bool = False, samples: int = 4096) -> TableCodec:
    """Principal components of rendered 4x4 blocks, each scaled by the square root of its deviation.

    Full whitening would give the faintest component the weight of the strongest, and no whitening
    would give the channels very different noise levels; the square root is in between. positions:
    for a transformer that does not number its text tokens; the other tables do not depend on it.
    """
    generator = torch.Generator().manual_seed(seed)
    pictures = render(random_captions(samples, generator), generator)
    blocks = F.pixel_unshuffle(pictures, BLOCK).movedim(1, -1).flatten(0, 2).double()
    mean = blocks.mean(0)
    _, values, vectors = torch.linalg.svd(
        (blocks - mean).T @ (blocks - mean) / len(blocks), full_matrices=False
    )
    deviation = values[:CHANNELS].sqrt()
    scale = deviation.sqrt() * deviation.mean().sqrt()  # mean channel variance becomes one
    basis = vectors[:CHANNELS].T
    embedding = torch.randn(len(VOCABULARY), TEXT_WIDTH, generator=generator)
    numbers = torch.randn(CAPTION_WORDS, TEXT_WIDTH, generator=generator) if positions else None
    return TableCodec(
        vocabulary=VOCABULARY,
        token_embedding=embedding,
        mean=mean.float(),
        encode=(basis / scale).float().contiguous(),
        decode=(basis * scale).T.float().contiguous(),
        position_embedding=numbers,
    )
