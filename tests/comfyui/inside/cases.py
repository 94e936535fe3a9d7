"""The tiny models that the tests in this folder run on, one for each architecture and kind."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from ...tiny.flux1_parts import FLUX_DEPTH, FLUX_PARTS
from ...tiny.sd35_parts import SD35_PARTS, SD35_SIZES
from ...tiny.trained_run import PlanParts
from ...tiny.z_image_parts import Z_IMAGE_PARTS


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the tests of an architecture run on."""

    architecture: str
    file: str
    """name of its teacher's file"""
    channels: dict[str, int | list[int]]
    """settings of its tiny model, which give it the host's latents"""
    frames: bool = False
    """whether a latent has a dimension of frames"""
    parts: PlanParts = field(default_factory=PlanParts)
    """of its plan"""
    pooled: int | None = None
    """width of the pooled text in its conditioning"""
    guidance: float | None = None
    """in its conditioning"""


# 64 in all: some formats want no less
WIDE = {"attention_head_dim": 32, "axes_dims_rope": [4, 14, 14]}
WIDE_Z = {"dim": 192, "n_heads": 6, "n_kv_heads": 6, "axes_dims": [8, 12, 12]}
CASES = {
    "qwen_image": Case(
        architecture="qwen_image",
        file="teacher",
        channels={"in_channels": 64, "out_channels": 16},
        frames=True,
    ),
    "flux1": Case(
        architecture="flux1",
        file="flux",
        channels={"in_channels": 64, **FLUX_DEPTH},
        parts=FLUX_PARTS,
        pooled=20,
        guidance=3.5,
    ),
    "qwen_image_wide": Case(
        architecture="qwen_image",
        file="wide",
        channels={"in_channels": 64, "out_channels": 16, **WIDE},
        frames=True,
    ),
    "flux1_wide": Case(
        architecture="flux1",
        file="flux_wide",
        channels={"in_channels": 64, **FLUX_DEPTH, **WIDE},
        parts=FLUX_PARTS,
        pooled=20,
        guidance=3.5,
    ),
    "sd35": Case(
        architecture="sd35", file="sd35", channels=SD35_SIZES, parts=SD35_PARTS, pooled=20
    ),
    "sd35_large": Case(
        architecture="sd35",
        file="sd35_large",
        channels=SD35_SIZES | {"dual_attention_layers": []},
        parts=SD35_PARTS,
        pooled=20,
    ),
    "z_image": Case(
        architecture="z_image", file="z_image", channels={"in_channels": 16}, parts=Z_IMAGE_PARTS
    ),
    "z_image_wide": Case(
        architecture="z_image",
        file="z_image_wide",
        channels={"in_channels": 16, **WIDE_Z},
        parts=Z_IMAGE_PARTS,
    ),
}


# sizes of an edit model's reference latents
EDITS = {"text alone": (), "references": ((8, 12), (4, 8))}
edits = pytest.mark.parametrize("references", EDITS.values(), ids=EDITS, indirect=True)
