"""Configurations in a diffusers pipeline folder: the entries that this engine computes with."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ...system.schemas import Finite

Channels = Annotated[int, Field(ge=1, le=4096)]
Levels = Annotated[list, Field(min_length=1, max_length=12)]


class _Open(BaseModel):
    """Entries that are not named here are left to the library."""

    model_config = ConfigDict(extra="allow", strict=True)


class Scheduler(_Open):
    base_image_seq_len: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    max_image_seq_len: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    base_shift: Finite | None = None
    max_shift: Finite | None = None
    shift: Finite | None = None
    shift_terminal: Finite | None = None
    num_train_timesteps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


class QwenImage21Index(_Open):
    """model_index.json"""

    sample_sigmas: Annotated[list[Finite], Field(min_length=1, max_length=1000)] | None = None


class PooledVAE(_Open):
    """The VAE of FLUX and SD3.5."""

    latent_channels: Channels
    block_out_channels: Levels


class QwenVAE(_Open):
    z_dim: Channels
    temperal_downsample: Levels
