"""A model's configuration as files give it (config.json, metadata, a plan): types and bounds are
checked before anything is built from it. The sizes that a file's tensors show are compared with it
in `weights.Weights`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..system.schemas import MOST_BLOCKS, read_value

Size = Annotated[int, Field(ge=1, le=1 << 17)]
Layers = Annotated[int, Field(ge=0, le=MOST_BLOCKS)]
Head = Annotated[int, Field(ge=2, le=2048)]
Heads = Annotated[int, Field(ge=1, le=1024)]
Patch = Annotated[int, Field(ge=1, le=64)]
Channels = Annotated[int, Field(ge=1, le=1 << 14)]
Axes = Annotated[list[Annotated[int, Field(ge=1, le=2048)]], Field(min_length=3, max_length=3)]
EvenAxes = Annotated[
    list[Annotated[int, Field(ge=2, le=2048, multiple_of=2)]], Field(min_length=3, max_length=3)
]
LARGEST_TABLE = 1 << 30
"""values that diffusers computes for the positions of SD3.5; Medium has 226 million"""


class _Config(BaseModel):
    """Entries that this engine does not read are passed on unchanged."""

    model_config = ConfigDict(extra="allow", strict=True)

    in_channels: Channels

    def problem(self) -> str | None:
        """What does not fit together in it."""
        raise NotImplementedError


class _TwoStreams(_Config):
    patch_size: Patch = 1
    num_layers: Layers
    attention_head_dim: Head
    num_attention_heads: Heads
    joint_attention_dim: Size

    def problem(self) -> str | None:
        return axes_problem(getattr(self, "axes_dims_rope", None), self.attention_head_dim)


def axes_problem(axes: list[int] | None, head: int) -> str | None:
    if axes is not None and sum(axes) != head:
        return f"axes_dims_rope {axes} do not add up to attention_head_dim {head}"
    return None


class QwenImageConfig(_TwoStreams):
    out_channels: Channels | None = None
    axes_dims_rope: EvenAxes = [16, 56, 56]
    zero_cond_t: bool = False
    guidance_embeds: bool = False
    use_additional_t_cond: bool = False
    folding: dict[str, Any] | None = None


class Flux1Config(_TwoStreams):
    out_channels: Channels | None = None
    num_single_layers: Layers
    pooled_projection_dim: Size
    axes_dims_rope: Axes = [16, 56, 56]
    guidance_embeds: bool = False


class SD35Config(_TwoStreams):
    sample_size: Size = 128
    out_channels: Channels
    caption_projection_dim: Size
    pooled_projection_dim: Size
    pos_embed_max_size: Annotated[int, Field(ge=1, le=4096)]
    dual_attention_layers: list[Annotated[int, Field(ge=0, lt=MOST_BLOCKS)]] = []
    qk_norm: str | None

    def problem(self) -> str | None:
        table = self.pos_embed_max_size**2 * self.attention_head_dim * self.num_attention_heads
        if table > LARGEST_TABLE:
            return f"pos_embed_max_size {self.pos_embed_max_size} makes a table of {table:,}"
        return None


class ZImageConfig(_Config):
    all_patch_size: Annotated[list[Literal[2]], Field(min_length=1, max_length=1)] = [2]
    all_f_patch_size: Annotated[list[Literal[1]], Field(min_length=1, max_length=1)] = [1]
    dim: Size
    n_layers: Layers
    n_refiner_layers: Layers
    n_heads: Heads
    n_kv_heads: Heads
    qk_norm: Literal[True] = True
    cap_feat_dim: Size
    siglip_feat_dim: None = None
    axes_dims: EvenAxes
    axes_lens: Annotated[list[Size], Field(min_length=3, max_length=3)]

    def problem(self) -> str | None:
        if sum(self.axes_dims) * self.n_heads != self.dim:
            return f"axes_dims {self.axes_dims} of {self.n_heads} heads do not add up to dim {self.dim}"
        if self.n_kv_heads != self.n_heads:
            return f"n_kv_heads is {self.n_kv_heads}, not n_heads {self.n_heads}"
        return None


class QwenImage21Config(_Config):
    patch_size: Literal[1] = 1
    out_channels: Channels | None = None
    num_layers: Layers
    attention_head_dim: Head
    num_attention_heads: Heads
    context_in_dim: Size = 4096
    mlp_ratio: Annotated[int, Field(ge=1, le=64)] = 3
    axes_dims_rope: EvenAxes = [16, 56, 56]
    causal_condition: Literal[True] = True

    def problem(self) -> str | None:
        return axes_problem(self.axes_dims_rope, self.attention_head_dim)


SCHEMAS: dict[str, type[_Config]] = {
    "qwen_image": QwenImageConfig,
    "flux1": Flux1Config,
    "sd35": SD35Config,
    "z_image": ZImageConfig,
    "qwen_image_21": QwenImage21Config,
}


def check_model_config(name: str, config: object, where: object) -> dict:
    """The configuration, unchanged. Raises ValueError naming `where` and the entry. `name`: the
    architecture's."""
    if not isinstance(config, dict):
        raise ValueError(
            f"{where}: the configuration is not an object but {type(config).__name__}; restore it"
        )
    read = read_value(SCHEMAS[name], config, f"{where}: configuration")
    if problem := read.problem():
        raise ValueError(f"{where}: configuration: {problem}")
    return config


def sizes_that_differ(config: Mapping[str, Any], inferred: Mapping[str, Any]) -> list[str]:
    """Entries of a full model's configuration that its tensors' shapes contradict."""
    told = (
        "in_channels",
        "out_channels",
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
        "pooled_projection_dim",
        "caption_projection_dim",
        "pos_embed_max_size",
        "dim",
        "n_heads",
        "n_refiner_layers",
        "cap_feat_dim",
        "context_in_dim",
        "mlp_ratio",
    )
    return [
        n for n in told if n in inferred and config.get(n) is not None and config[n] != inferred[n]
    ]


def check_same_sizes(config: Mapping[str, Any], teacher: Mapping[str, Any], where: object) -> None:
    """Raises ValueError, naming `where` and the entry, for a plan's configuration of other sizes
    than its teacher's."""
    known = {name: value for name, value in teacher.items() if value is not None}
    for name in sizes_that_differ(config, known):
        raise ValueError(
            f"{where}: configuration: {name} is {config[name]}, but {known[name]} in its teacher; restore it"
        )
