"""`Host`: everything the nodes need to know about an architecture in ComfyUI ("the host").

One file in this folder describes one architecture; no other file names one. Files, plans and width
sites are the engine's business (`Host.engine`): here is only how ComfyUI names and runs the blocks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch
from torch import nn

from ...ppcl_engine.architectures import Architecture
from ...ppcl_engine.models.layout import Place
from ...ppcl_engine.plan import WidthSite

Maps = Callable[[str, str], nn.Module]
"""(site kind, part of its projection: "map" or "step") -> the linear map"""
Pieces = tuple[tuple[int, ...], int]
"""(which pieces are kept, into how many equal pieces a dimension is divided)"""
ALL: Pieces = ((0,), 1)


@dataclass(frozen=True)
class Cut:
    """What is left of a linear map."""

    rows: Pieces = ALL
    """of its outputs"""
    columns: Pieces = ALL
    """of its inputs"""

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        cut = zip(whole, (self.rows, self.columns), strict=False)
        return (*(size // of * len(kept) for size, (kept, of) in cut), *whole[2:])

    def share(self, dims: int) -> float:
        """The share of the numbers that is left of a weight (2 dimensions) or a bias (1)."""
        return math.prod(len(kept) / of for kept, of in (self.rows, self.columns)[:dims])

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """What is left of a weight or a bias."""
        for dim, (kept, of) in zip(range(whole.ndim), (self.rows, self.columns), strict=False):
            if of > 1:
                pieces = whole.chunk(of, dim)
                whole = torch.cat([pieces[piece] for piece in kept], dim)
        return whole

    def whole(self, cut: torch.Tensor) -> torch.Tensor:
        """The inverse of `of`: in full size, with zeros where nothing is left."""
        for dim, (kept, of) in zip(range(cut.ndim), (self.rows, self.columns), strict=False):
            if of > 1:
                pieces = dict(zip(kept, cut.chunk(len(kept), dim), strict=True))
                zeros = torch.zeros_like(pieces[kept[0]])
                cut = torch.cat([pieces.get(piece, zeros) for piece in range(of)], dim)
        return cut


HALF = Cut(rows=((0,), 2))
"""what the paper's form of an FFN projection leaves of a modulation: the attention's half"""


@dataclass(frozen=True, kw_only=True)
class BlockList:
    """One of the lists of blocks in the host's transformer."""

    name: str
    """the transformer's attribute"""
    kind: str
    """name of the blocks' class in the host's module"""
    depth: str
    """key of the number of blocks in the engine's configuration"""
    reads: dict[str, str]
    """stream ("image", "text", or "joint": text and image in one sequence) -> name of the block's
    argument, in the order of the arguments"""
    gives: tuple[str, ...]
    """the streams that a block returns, in their order"""
    settings: str = ""
    """the argument of the block's class that holds dtype, device and operations by name; empty: they
    are arguments themselves"""

    def built_with(self, arguments: Mapping) -> Mapping:
        """dtype, device and operations, of the arguments that a block is built with."""
        return arguments[self.settings] if self.settings else arguments


class Host:
    """One architecture in the host. Each file of an architecture has one subclass, whose single
    object is in the registry (`nodes/host/__init__.py`).

    To add one, set the attributes below and override the methods from `is_stock` on; the other
    files of this folder are examples.
    """

    engine: Architecture
    """the same architecture in `ppcl_engine.architectures`: it reads files and configurations, and
    its `comfyui_projections` say which sub-module of the host's block each projection replaces"""
    stock: tuple[str, ...]
    """names of the host's config classes, from which `entries.config_classes` derives ours"""
    module: ModuleType
    """the host's module that defines the transformer and its blocks"""
    model: str
    """name of the transformer's class in `module`"""
    lists: tuple[BlockList, ...]
    """the lists of blocks in the order in which they run; the teacher's blocks are counted through
    them"""
    told: tuple[str, ...] = ()
    """configuration entries that are taken from a plan, since the tensors of a pruned model may not
    show them"""
    unread: tuple[str, ...] = ()
    """modules that some version of the host builds and no forward reads; they are taken out"""
    mark: str
    """a tensor outside of the blocks that every file of this architecture has, and that nothing
    else in a checkpoint has"""
    text_map: str
    """the first map of a block that reads the modulated text: what enters it is what a text group
    reads"""
    viewed: tuple[str, ...]
    """sub-modules that `project_ffn` and `project_text` change inside, outer ones first: a view of
    a block copies them, so that a switchable model's own stay as they are"""
    replaced: dict[str, tuple[str, ...]]
    """site kind -> prefixes of the block's tensors that its projection makes superfluous"""
    cuts: dict[tuple[str, str], dict[str, Cut]] = {}
    """(site kind, form) -> linear map -> what is left of it, where that is the same in all blocks;
    otherwise override `cuts_at`"""
    final: str
    """where modulations can be folded: the module behind the blocks that reads their
    conditioning"""

    @property
    def presets(self) -> dict[str, tuple[int, int, str]]:
        """Released pruned models that number their blocks from 0: name -> (number of the teacher's
        blocks, number of blocks kept, the intervals)."""
        return self.engine.released.intervals if self.engine.released else {}

    @cached_property
    def block_name(self) -> re.Pattern:
        """Matches the name of a tensor in a block: (list, number in the list, the rest)."""
        return re.compile(rf"({'|'.join(blocks.name for blocks in self.lists)})\.(\d+)\.(.+)")

    def ranges(self, config: Mapping) -> dict[str, range]:
        """Name of a list -> the teacher's indices of its blocks."""
        by_list, start = {}, 0
        for blocks in self.lists:
            by_list[blocks.name] = range(start, start := start + config[blocks.depth])
        return by_list

    def list_of(self, config: Mapping, index: int) -> BlockList:
        return next(blocks for blocks in self.lists if index in self.ranges(config)[blocks.name])

    def prefix(self, config: Mapping, index: int) -> str:
        """Prefix of the names of a block's tensors, such as "double_blocks.3."."""
        name = self.list_of(config, index).name
        return f"{name}.{index - self.ranges(config)[name].start}."

    def block_of(self, config: Mapping, name: str) -> tuple[int, str] | None:
        """(the teacher's index of its block, the rest of the name) of a tensor; None outside of
        blocks."""
        match = self.block_name.match(name)
        return (self.ranges(config)[match[1]].start + int(match[2]), match[3]) if match else None

    def built_before(self, config: Mapping, blocks: BlockList) -> int:
        """How many blocks of the same class the host's model builds before this list: they stay as
        they are."""
        return 0

    def cuts_at(self, config: Mapping, site: WidthSite) -> dict[str, Cut]:
        """What a projected site leaves of the linear maps in its block, by their names."""
        return self.cuts.get((site.kind, site.form), {})

    def vacated(self, place: Place) -> tuple[str, ...]:
        """Prefixes of a block's tensors that the projections of a place make superfluous."""
        gone = [prefix for kind in place.projections for prefix in self.replaced[kind]]
        return (*gone, "correction.maps.text.") if place.text_source is not None else tuple(gone)

    def spread(self, config: Mapping, indices: Sequence[int], blocks: int) -> dict:
        """The configuration of a teacher with `blocks` blocks, of which a model that numbers its
        own from 0 has those at `indices`.

        How the teacher's blocks divide into lists follows from where each list starts: pruning
        never drops the first block of a list.
        """
        starts = [
            indices[r.start] if r.start < len(indices) else blocks
            for r in self.ranges(config).values()
        ]
        ends = [*starts[1:], blocks]
        depths = [end - start for start, end in zip([0, *starts[1:]], ends, strict=True)]
        return {
            **config,
            **{blocks.depth: depth for blocks, depth in zip(self.lists, depths, strict=True)},
        }

    def is_stock(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Whether the host itself loads a full model with these shapes."""
        raise NotImplementedError

    def check_told(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError where the tensors alone do not tell which blocks a file has. Called for
        files that carry no plan and do not come through our own loader."""

    def project_ffn(self, block: nn.Module, kind: str, form: str, projection: nn.Module) -> None:
        """Puts the projection into the block. A map that `cuts_at` names may still be whole (in a
        switchable model) or be cut already."""
        raise NotImplementedError

    def project_text(
        self, block: nn.Module, place: Place, maps: Maps, texts, source: nn.Module
    ) -> None:
        """Removes the text's modulation, norms and MLP from the block; `blocks.ProjectedText` then
        gives what attention reads of the text."""
        raise NotImplementedError

    def arguments(self, config: Mapping) -> dict:
        """Arguments of the host's class for a model of the engine's configuration."""
        raise NotImplementedError

    def time_embedder(self, width: int, **options) -> nn.Module:
        """Where modulations can be folded: the host's module that computes their conditioning."""
        raise NotImplementedError

    def check_references(
        self, transformer: nn.Module, config: Mapping, method: str | None, pictures: int
    ) -> None:
        """For an edit model: raises ValueError unless the host positions this many reference
        pictures as the engine does. method: the host's way to do so, where the conditioning names
        one."""
        raise ValueError(
            f"calibrations of {self.engine.name} hold no reference pictures; sample without them"
        )

    def count_text_tokens(self, transformer: nn.Module, texts) -> None:
        """Where blocks read text and image as one sequence: keeps the number of text tokens in
        `texts.tokens`."""
