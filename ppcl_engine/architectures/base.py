"""What the method needs to know of an architecture: an initial layer, blocks, a final layer.

Every stage is a loop over blocks: `BlockState` in, `BlockState` out. Whatever else an architecture
needs (rotary tables, masks, guidance) travels inside the state and concerns only the architecture
itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from .modules import AnyModule
from .projections import SharedText

Inputs = dict[str, torch.Tensor]
"""What one forward reads, named as most of diffusers' classes name it, plus `grid` [images, 3] (frames, rows,
columns): first the picture to draw, then an edit model's references, whose tokens are in
`image_latents`."""

REFERENCES = "image_latents"


def placed(inputs: Inputs, device: str | torch.device, dtype: torch.dtype) -> Inputs:
    """The inputs on the device, in `dtype`; timesteps keep their precision, the grid stays where it
    is."""

    def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
        floating = tensor.is_floating_point() and name != "timestep"
        return tensor.to(device, dtype if floating else tensor.dtype)

    return {name: t if name == "grid" else moved(name, t) for name, t in inputs.items()}


@dataclass(frozen=True)
class BlockState:
    """What goes into a block and comes out of it, for a batch of n samples."""

    image: torch.Tensor
    """[n, image_tokens, d]"""
    text: torch.Tensor
    """[n, text_tokens, d]"""
    conditioning: torch.Tensor
    """[n, d]"""
    text_mask: torch.Tensor | None = None
    """[n, text_tokens]; None: all tokens are real"""
    extra: Any = None
    """whatever else the blocks read"""
    modulated_text: torch.Tensor | None = None
    """what a text group's source leaves for the group's projections"""
    target_tokens: int | None = None
    """how many of the first image tokens belong to the picture to draw; references follow. None:
    all"""
    target_only: bool = False
    """whether references are left out of every statistic and loss"""
    padding: int = 0
    """how many of the last image tokens only fill the sequence up: blocks read them, nothing counts
    them"""
    joint_order: tuple[str, ...] = ("text", "image")
    """the streams in the order in which a block that runs them as one sequence has them"""

    def with_streams(self, image: torch.Tensor, text: torch.Tensor) -> BlockState:
        return replace(self, image=image, text=text)

    def stream(self, name: str) -> torch.Tensor:
        """ "image", "text", or "joint": both as one sequence."""
        if name == "joint":
            return torch.cat([self.stream(stream) for stream in self.joint_order], dim=1)
        return getattr(self, name)

    def real(self, name: str) -> torch.Tensor:
        """Mask [n, tokens] of the tokens that count: padding does not, nor, with `target_only`, do
        references."""
        if name == "joint":
            return torch.cat([self.real(stream) for stream in self.joint_order], dim=1)
        tokens = self.stream(name)
        if name == "text" and self.text_mask is not None:
            return self.text_mask
        real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        if name == "image" and self.target_only and self.target_tokens is not None:
            real[:, self.target_tokens :] = False
        if name == "image" and self.padding:
            real[:, -self.padding :] = False
        return real

    def real_tokens(self, name: str) -> torch.Tensor:
        """[real tokens of all samples, d]"""
        return self.stream(name)[self.real(name)]


@dataclass(frozen=True, kw_only=True)
class ReleasedNames:
    """How the method's authors store a width-pruned model of an architecture (method: checkpoints
    in the wild)."""

    lists: dict[str, str]
    """ "text", "step", "ffn" -> the entry of config.json that lists such blocks, by their new
    numbers"""
    projections: dict[str, tuple[str, str]]
    """a block's key -> (site kind, part of its projection)"""
    unused: tuple[str, ...]
    """keys of a text-pruned block that nothing reads"""
    intervals: dict[str, tuple[int, int, str]]
    """release -> (teacher's blocks, blocks kept, the intervals), where they are published"""


@dataclass(frozen=True)
class Part:
    """Where one of diffusers' tensors lies in ComfyUI's layout: which rows of which tensor."""

    name: str
    """the tensor in ComfyUI's layout"""
    pieces: tuple[int, ...] = (0,)
    """which of its `of` equal pieces make up diffusers' tensor, in that tensor's order"""
    of: int = 1
    """into how many equal pieces the rows of `name` are cut"""


class Architecture(Protocol):
    """One registered architecture. Configurations are dicts with diffusers' own names."""

    name: str
    diffusers_class: str
    gguf_name: str
    """what `general.architecture` is in GGUF files, as ComfyUI-GGUF reads it"""
    block_arguments: dict[str, str]
    """stream -> the name of a block's argument that brings it"""
    block_returns: tuple[str, ...]
    """the streams in the order in which a block returns them; ("joint",) where it takes and returns
    both as one tensor, and then each block has `image_tokens`, the slice of its tokens that are the
    image's"""
    caption_inputs: tuple[str, ...]
    """the inputs that come from captions, by diffusers' names, one row each; the text itself
    first"""
    timestep_modulations: tuple[str, ...]
    """a block's linear maps that read silu(conditioning), each behind its activation in a
    Sequential; empty: the modulations cannot be folded"""
    time_embedder: str
    """the outer module that makes the conditioning"""
    marks: dict[str, str]
    """empty tensors that hosts put into their single files for what shapes do not show -> the entry
    of the configuration that each turns on"""
    unread: tuple[str, ...] = ()
    """tensors of hosts' single files that no forward reads, by their names there"""
    model_configs: dict[str, dict]
    """full-size models by name; the first is the default"""
    tiny_config: dict
    """a model of all kinds of blocks that is as small as can be, for tests and for names"""
    projection_names: dict[str, dict[str, str]]
    """site kind -> part ("map", "step") -> the sub-module of a projected block that is this linear
    map"""
    comfyui_projections: dict[str, dict[str, str]]
    """the same by ComfyUI's names: the module of the host's block that becomes the projection"""
    replaced_names: dict[str, tuple[str, ...]]
    """site kind -> prefixes of the block's tensors that its projection replaces"""
    cut_names: dict[tuple[str, str], tuple[str, ...]]
    """(site kind, form) -> prefixes of the block's tensors of which only the first rows or columns
    are kept"""
    released: ReleasedNames | None
    """None where the method's authors published no pruned model"""

    def detect(self, keys: Iterable[str]) -> bool: ...

    def infer_config(
        self, shapes: Callable[[str], tuple[int, ...]], keys: Iterable[str]
    ) -> dict: ...

    def num_blocks(self, config: dict) -> int: ...

    def sections(self, config: dict) -> tuple[range, ...]:
        """Runs of blocks of one kind; an interval stays inside one run."""
        ...

    def with_blocks(self, config: dict, indices: Sequence[int]) -> dict:
        """The configuration of a model that has only these blocks."""
        ...

    def width(self, config: dict) -> int: ...

    def text_width(self, config: dict) -> int:
        """Channels of a caption's embedding."""
        return config["joint_attention_dim"]

    def token_channels(self, config: dict) -> int:
        """Channels of a token as `pack` makes it."""
        return config["in_channels"]

    def filled_up(self, tokens: int) -> int:
        """How many tokens of a stream blocks run for so many of its own."""
        return tokens

    def attended_pairs(self, image: int, text: int) -> int:
        """How many pairs of tokens a block's joint attention computes for so many of each."""
        return (image + text) ** 2

    def block_prefix(self, config: dict, index: int) -> str: ...

    def build_block(self, config: dict, index: int) -> nn.Module: ...

    def build_outer(self, config: dict) -> AnyModule: ...

    def assemble(self, outer: nn.Module, config: dict, blocks: list[nn.Module]) -> nn.Module: ...

    def site_kinds(self, config: dict, index: int) -> tuple[str, ...]:
        """The parts of a block that projections can replace."""
        ...

    forms: dict[str, tuple[str, ...]] = {}
    """site kind -> the forms of its projections ("paper", "gated"), where it does not have both"""

    def project_ffn(self, block: nn.Module, kind: str, form: str) -> None: ...

    def project_text(self, block: nn.Module, source: SharedText, steps: bool) -> None:
        raise ValueError(f"blocks of {self.diffusers_class} have no text maps of their own")

    def publish_text(self, block: nn.Module, source: SharedText) -> None:
        raise ValueError(f"blocks of {self.diffusers_class} have no text maps of their own")

    def observe(
        self, block: nn.Module, state: BlockState
    ) -> tuple[BlockState, dict[str, torch.Tensor]]: ...

    def modulation_reads(self, config: dict) -> tuple[str, ...]:
        """What the conditioning is computed from, in words; `("the timestep",)` where modulations
        can be folded."""
        ...

    def reference_timesteps(self, config: dict) -> tuple[float, ...]:
        """Timesteps that every forward reads besides its own (0 for an edit model's references),
        where modulations can be folded."""
        return ()

    def time_conditioning(
        self, embedder: nn.Module, timestep: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """The time embedder's output for timesteps [n] in a model of this precision, where
        modulations can be folded."""
        raise ValueError(f"modulations of {self.diffusers_class} read more than the timestep")

    def used_streams(self, config: dict, index: int) -> tuple[str, ...]: ...

    def embed(self, outer: nn.Module, inputs: Inputs) -> BlockState: ...

    def run_block(self, block: nn.Module, state: BlockState) -> BlockState: ...

    def final_image(self, outer: nn.Module, state: BlockState) -> torch.Tensor: ...

    def finish(self, outer: nn.Module, state: BlockState) -> torch.Tensor: ...

    def pack(self, latents: torch.Tensor) -> torch.Tensor: ...

    def unpack(self, tokens: torch.Tensor, grid: torch.Tensor) -> torch.Tensor: ...

    def grid(self, latents: torch.Tensor) -> torch.Tensor: ...

    def latent_shape(self, config: dict, height: int, width: int) -> tuple[int, int, int]: ...

    def takes_guidance(self, config: Mapping) -> bool:
        """Whether guidance is an input of the model, so that one forward gives the guided
        velocity."""
        ...

    def call(self, model: nn.Module, inputs: Inputs) -> torch.Tensor: ...

    def to_comfyui(self, key: str, keys: Collection[str]) -> Part:
        """Where a tensor, by diffusers' name, lies in ComfyUI's layout. `keys`: diffusers' names of
        all the model's tensors.

        Raises KeyError for a name that the model does not have.
        """
        ...

    def from_comfyui(self, name: str) -> tuple[str, ...]:
        """diffusers' names of what lies in a tensor of ComfyUI's layout, in any of its spellings;
        any other name comes back unchanged."""
        ...

    def random_inputs(
        self, config: dict, samples: int, grid: tuple, text_tokens: int, device: str
    ) -> Inputs: ...


def modulation_names(names: Iterable[str], architecture: Architecture) -> list[str]:
    """The modulations that can be folded, among the tensors `names`."""
    endings = tuple(f".{name}.weight" for name in architecture.timestep_modulations)
    return [name.removesuffix(".weight") for name in names if name.endswith(endings)]
