"""What the nodes need to know of an architecture in the host: one file an architecture, and `Host`
is the whole of it.

Nothing outside those files knows an architecture's name. Files, plans and sites are the engine's
business (`Host.engine`); here is only how the host names and runs the same blocks.
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
"""(site kind, part of its projection) -> the linear map"""
Pieces = tuple[tuple[int, ...], int]
"""(which, of how many equal ones)"""
ALL: Pieces = ((0,), 1)


@dataclass(frozen=True)
class Cut:
    """What is left of a linear map: pieces of its rows (outputs), and of its columns (inputs)."""

    rows: Pieces = ALL
    columns: Pieces = ALL

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        cut = zip(whole, (self.rows, self.columns), strict=False)
        return (*(size // of * len(kept) for size, (kept, of) in cut), *whole[2:])

    def share(self, dims: int) -> float:
        """Of the numbers of a weight (2) or a bias (1)."""
        return math.prod(len(kept) / of for kept, of in (self.rows, self.columns)[:dims])

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """Of a weight or a bias."""
        for dim, (kept, of) in zip(range(whole.ndim), (self.rows, self.columns), strict=False):
            if of > 1:
                pieces = whole.chunk(of, dim)
                whole = torch.cat([pieces[piece] for piece in kept], dim)
        return whole

    def whole(self, cut: torch.Tensor) -> torch.Tensor:
        """Zeros where nothing is left."""
        for dim, (kept, of) in zip(range(cut.ndim), (self.rows, self.columns), strict=False):
            if of > 1:
                pieces = dict(zip(kept, cut.chunk(len(kept), dim), strict=True))
                zeros = torch.zeros_like(pieces[kept[0]])
                cut = torch.cat([pieces.get(piece, zeros) for piece in range(of)], dim)
        return cut


HALF = Cut(rows=((0,), 2))
"""What the paper's form of an FFN leaves of a modulation"""


@dataclass(frozen=True, kw_only=True)
class BlockList:
    """One of the lists of blocks in the host's transformer. name: of the list; kind: of the class
    of its blocks; depth: the engine's setting that counts them. reads: stream ("image", "text", or
    "joint": text and image as one) -> the block's argument, in their order; gives: the streams that
    it returns, in their order."""

    name: str
    kind: str
    depth: str
    reads: dict[str, str]
    gives: tuple[str, ...]


class Host:
    """One architecture in the host: a subclass a file, whose one object is in the registry
    (`nodes/host/__init__.py`).

    To write one, give these, and override the methods at the end; the other files of this folder
    are the examples:

    engine          the same architecture of `ppcl_engine.architectures`, which reads files and
    configurations, and says in
                    `comfyui_projections` which sub-module of the host's block each projection is
    stock           names of the host's config classes: `building.config_classes` derives ours,
    which claim the files that
                    it can't load
    module, model   the host's module of the transformer, and the name of its class there
    presets         released models that count their blocks anew; those of the engine where it knows
    some lists           its lists of blocks, in the order in which they run: the teacher's blocks
    are counted through them told            entries of a configuration that a plan knows and the
    tensors that are left may not say mark            a tensor outside of blocks that every file of
    it has, and nothing beside it in a checkpoint text_map        a block's first map of the
    modulated text: what enters it is what a text group reads viewed          sub-modules that
    `project_*` change inside, outer ones first (a switchable model's stay as they are) replaced
    site kind -> beginnings of the tensors that its projection leaves no place for cuts
    (site kind, form) -> linear map -> what is left of it, where that is the same in all blocks
    (`cuts_at`) final           where modulations can be folded: what reads their conditioning
    behind the blocks
    """

    engine: Architecture
    stock: tuple[str, ...]
    module: ModuleType
    model: str
    lists: tuple[BlockList, ...]
    told: tuple[str, ...] = ()
    mark: str
    text_map: str
    viewed: tuple[str, ...]
    replaced: dict[str, tuple[str, ...]]
    cuts: dict[tuple[str, str], dict[str, Cut]] = {}
    final: str

    @property
    def presets(self) -> dict[str, tuple[int, int, str]]:
        """Released models that count their blocks anew: name -> (teacher's blocks, blocks kept, the
        intervals)."""
        return self.engine.released.intervals if self.engine.released else {}

    @cached_property
    def block_name(self) -> re.Pattern:
        """Of a tensor in a block: list, number in it, the rest."""
        return re.compile(rf"({'|'.join(blocks.name for blocks in self.lists)})\.(\d+)\.(.+)")

    def ranges(self, config: Mapping) -> dict[str, range]:
        """List -> the teacher's indices of its blocks."""
        by_list, start = {}, 0
        for blocks in self.lists:
            by_list[blocks.name] = range(start, start := start + config[blocks.depth])
        return by_list

    def list_of(self, config: Mapping, index: int) -> BlockList:
        return next(blocks for blocks in self.lists if index in self.ranges(config)[blocks.name])

    def prefix(self, config: Mapping, index: int) -> str:
        """ "double_blocks.3." """
        name = self.list_of(config, index).name
        return f"{name}.{index - self.ranges(config)[name].start}."

    def block_of(self, config: Mapping, name: str) -> tuple[int, str] | None:
        """(the teacher's index, the rest) of a tensor's name; None outside of blocks."""
        match = self.block_name.match(name)
        return (self.ranges(config)[match[1]].start + int(match[2]), match[3]) if match else None

    def cuts_at(self, config: Mapping, site: WidthSite) -> dict[str, Cut]:
        """Of the site's block: linear map -> what is left of it."""
        return self.cuts.get((site.kind, site.form), {})

    def vacated(self, place: Place) -> tuple[str, ...]:
        """Beginnings of the names of a block's tensors that the place's projections leave no place
        for."""
        gone = [prefix for kind in place.projections for prefix in self.replaced[kind]]
        return (*gone, "correction.maps.text.") if place.text_source is not None else tuple(gone)

    def spread(self, config: Mapping, indices: Sequence[int], blocks: int) -> dict:
        """The configuration of a teacher of so many blocks, of which a model that counts anew has
        `indices`: a list's first block always stays."""
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
        """Whether a full model with these shapes is one that the host loads by itself."""
        raise NotImplementedError

    def check_told(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Of a file that says neither by a plan nor by our loader which blocks it has: raises
        ValueError where a model can't be built by its tensors alone."""

    def project_ffn(self, block: nn.Module, kind: str, form: str, projection: nn.Module) -> None:
        """Puts the projection in its place; a map that `cuts_at` names may be whole (a switchable
        model's) or cut."""
        raise NotImplementedError

    def project_text(
        self, block: nn.Module, place: Place, maps: Maps, texts, source: nn.Module
    ) -> None:
        """No modulation, norm or MLP of the text is left; `blocks.ProjectedText` gives what
        attention reads of it."""
        raise NotImplementedError

    def arguments(self, config: Mapping) -> dict:
        """Of the host's class, of a model of the engine's configuration."""
        raise NotImplementedError

    def time_embedder(self, width: int, **options) -> nn.Module:
        """Where modulations can be folded: what makes their conditioning, of the host's classes."""
        raise NotImplementedError

    def check_references(
        self, transformer: nn.Module, config: Mapping, method: str | None, pictures: int
    ) -> None:
        """Of an edit model: raises ValueError unless the host places this many reference pictures
        as the engine does.
        method: how, where the conditioning says it."""
        raise ValueError(
            f"calibrations of {self.engine.name} hold no reference pictures; sample without them"
        )

    def watch(self, transformer: nn.Module, texts) -> None:
        """Where blocks read text and image as one sequence: keeps `texts.tokens`, the number of
        text tokens."""
