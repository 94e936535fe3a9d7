"""The pruned models that the method's authors released, read by the names of our own modules.

Their folders number the remaining blocks from 0 and list the width-pruned ones in config.json
(method: checkpoints in the wild). A block's place, its projections and its tensors follow from
these lists.
"""

from __future__ import annotations

import hashlib
import math
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from ..architectures import ARCHITECTURES, Architecture, detect_architecture
from ..plan import Interval, WidthSite, parse_intervals
from ..system.atomic import read_object
from .assembly import empty_model
from .filling import check_shape, fill
from .layout import Layout, Place
from .model_configs import check_model_config
from .stored_layout import open_layout, transformer_folder
from .surgery import empty_block

Shapes = dict[str, tuple[int, ...]]


class Released:
    """A released folder, width-pruned or only depth-pruned; tensors are read one at a time.

    Attributes: path, architecture, config (for the blocks that are there, without the lists),
    layout (renumbered places). legacy_txt_proj: an older release computes P(x) where newer ones
    compute P(x) + x, under the same names; it is read as P - 1. Raises ValueError, in one line, for
    a missing tensor or one without a place.
    """

    kind = "released width-pruned"

    def __init__(self, path: str | Path, legacy_txt_proj: bool = False):
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(
                f"{path} is not a folder; give the released folder, config.json included"
            )
        self._stored, config = open_layout(self.path)
        if config is None:
            raise ValueError(f"{path} has no config.json; download the whole folder")
        self.architecture: Architecture = detect_architecture(self._stored, self.path)
        check_model_config(self.architecture.name, config, self.path)
        if self.architecture.num_blocks(config) > len(self._stored):
            raise ValueError(
                f"{path}: config.json says {self.architecture.num_blocks(config)} blocks, more than it has tensors; is the config.json of another model?"
            )
        self.layout = released_layout(self.architecture, config, self.path)
        lists = _lists_of(self.architecture)
        self.config = {name: value for name, value in config.items() if name not in lists.values()}
        self._names, self._shapes, unused = stored_tensors(
            self.architecture, self.config, self.layout
        )
        self._unused = {name: stored for name, stored in unused.items() if stored in self._stored}
        self._maps = (
            _text_maps(self.architecture, self.config, self.layout) if legacy_txt_proj else set()
        )
        if legacy_txt_proj and not self._maps:
            raise ValueError(
                f"{path} has no text projections, so --legacy-txt-proj has no effect; leave it out"
            )
        self._check()

    @property
    def num_blocks(self) -> int:
        return self.layout.num_blocks

    @property
    def parameters(self) -> int:
        """As stored: unused tensors count, as in the published sizes."""
        return sum(math.prod(file.shape(name)) for file, name in self._stored.values())

    def keys(self) -> list[str]:
        return list(self._names)

    def has(self, key: str) -> bool:
        """Whether it is stored, used or not."""
        return key in self._names or key in self._unused

    def shape(self, key: str) -> tuple[int, ...]:
        file, name = self._place(key)
        return file.shape(name)

    def dtype(self, key: str) -> torch.dtype:
        file, name = self._place(key)
        return file.dtype(name)

    def read(self, key: str) -> torch.Tensor:
        """As stored; a text projection of the older form in float32, because 1 is subtracted from
        its diagonal."""
        file, name = self._place(key)
        tensor = file.read(name)
        return tensor.float() - torch.eye(len(tensor)) if key in self._maps else tensor

    def model(self, dtype: torch.dtype, device: str) -> nn.Module:
        empty = empty_model(self.architecture, self.config, self.layout)
        return fill(empty, self.read, dtype, device, self.path)

    @cached_property
    def repeated_steps(self) -> list[int]:
        """Places whose text step equals that of another group bit for bit: the authors' exporter
        wrote one group's step into several."""
        places_by_step: dict[bytes, list[int]] = {}
        for place in self.layout.places:
            if place.steps_text:
                prefix = self._step_prefix(place)
                tensors = [
                    self.read(f"{prefix}.{leaf}").contiguous() for leaf in ("weight", "bias")
                ]
                mark = b"".join(
                    hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).digest() for t in tensors
                )
                places_by_step.setdefault(mark, []).append(place.index)
        return sorted(
            index for places in places_by_step.values() if len(places) > 1 for index in places
        )

    def _step_prefix(self, place: Place) -> str:
        return (
            self.architecture.block_prefix(self.config, place.index)
            + self.architecture.projection_names["text"]["step"]
        )

    def _place(self, key: str):
        return self._stored[self._names[key] if key in self._names else self._unused[key]]

    def _check(self) -> None:
        missing = sorted(stored for stored in self._names.values() if stored not in self._stored)
        unknown = sorted(set(self._stored) - set(self._names.values()) - set(self._unused.values()))
        if missing:
            raise ValueError(
                f"{self.path} lacks {len(missing)} tensors, first {missing[0]}; download it again"
            )
        if unknown:
            raise ValueError(
                f"{self.path} has {len(unknown)} tensors that the model does not have, first {unknown[0]}; "
                "are the lists in its config.json those of this model?"
            )
        for key, shape in self._shapes.items():
            check_shape(self._names[key], self.shape(key), shape, self.path)
            if not self.dtype(key).is_floating_point:
                raise ValueError(
                    f"{self.path}: {self._names[key]} is {self.dtype(key)}, not numbers of a model; restore it"
                )


def is_width_pruned(path: Path) -> bool:
    """Whether it is a folder whose config.json lists width-pruned blocks, of any architecture."""
    file = transformer_folder(path) / "config.json"
    if not file.exists():
        return False
    config = read_object(file)
    return any(
        name in config
        for architecture in ARCHITECTURES
        for name in _lists_of(architecture).values()
    )


def released_layout(architecture: Architecture, config: dict, where: object) -> Layout:
    """Renumbered places. Every text-pruned block reads from the last full block before it; the text
    moves on only where the lists say so.

    Raises ValueError for lists that name a missing block or contradict each other.
    """
    count, lists = architecture.num_blocks(config), _lists_of(architecture)
    text, steps, ffn = (
        _indices(config, lists.get(kind), count, where) for kind in ("text", "step", "ffn")
    )
    if steps - text:
        raise ValueError(
            f"{where}: block {min(steps - text)} is in {lists['step']} but not in {lists['text']}; restore its config.json"
        )
    if 0 in text:
        raise ValueError(
            f"{where}: block 0 is in {lists['text']}, but there is no full block before it; restore its config.json"
        )
    sources = {index: max(i for i in range(index) if i not in text) for index in text}
    places = [
        Place(
            index=index,
            ffn=_ffn_sites(index, index in text) if index in ffn else (),
            text_source=sources.get(index),
            steps_text=index in steps,
            publishes=index in sources.values(),
        )
        for index in range(count)
    ]
    return Layout(num_blocks=count, places=tuple(places))


def stored_tensors(
    architecture: Architecture, config: dict, layout: Layout
) -> tuple[dict[str, str], Shapes, dict[str, str]]:
    """(our name -> stored name, our name -> shape, our name in a full block -> stored name of a
    tensor that nothing reads)."""
    names, shapes, unused = {}, {}, {}
    with torch.device("meta"):
        for name, tensor in architecture.build_outer(config).state_dict().items():
            names[name], shapes[name] = name, tuple(tensor.shape)
        for place in layout.places:
            prefix, renamed = (
                architecture.block_prefix(config, place.index),
                _renamed(architecture, place),
            )
            for name, tensor in empty_block(architecture, config, place, {}).state_dict().items():
                part, _, leaf = name.rpartition(".")
                names[prefix + name] = f"{prefix}{renamed.get(part, part)}.{leaf}"
                shapes[prefix + name] = tuple(tensor.shape)
            if place.text_source is not None:
                full = architecture.build_block(config, place.index).state_dict()
                unused |= {
                    prefix + name: prefix + name
                    for name in full
                    if architecture.released and name.startswith(architecture.released.unused)
                }
    return names, shapes, unused


def published_intervals(
    architecture: Architecture, config: dict, teacher_blocks: int | None = None
) -> tuple[Interval, ...] | None:
    """The intervals of a release with this many blocks; found by its teacher's depth, or by the
    full-size model's width."""
    if architecture.released is None:
        return None
    widths = {architecture.width(known) for known in architecture.model_configs.values()}
    for teacher, kept, intervals in architecture.released.intervals.values():
        fits = teacher_blocks == teacher if teacher_blocks else architecture.width(config) in widths
        if fits and kept == architecture.num_blocks(config):
            return parse_intervals(intervals)
    return None


def teacher_indices(kept: int, intervals: tuple[Interval, ...]) -> list[int]:
    """Teacher indices of the blocks that stay when every interval leaves its first place to a
    student."""
    gaps = {index for interval in intervals for index in interval.blocks[1:]}
    return [index for index in range(kept + len(gaps)) if index not in gaps]


def repeated_steps_warning(released: Released, indices: list[int] | None = None) -> str | None:
    """One line naming the blocks (by teacher index where known); None when every group has its own
    step."""
    repeated = released.repeated_steps
    if not repeated:
        return None
    blocks = " ".join(str(indices[index] if indices else index) for index in repeated)
    return (
        f"blocks {blocks} share one text step, fitted for another block: a known fault of the authors' exporter; "
        "it is read as it is, `ppcl import --refit` fits each one from the teacher"
    )


def _lists_of(architecture: Architecture) -> dict[str, str]:
    return architecture.released.lists if architecture.released else {}


def _indices(config: dict, name: str | None, count: int, where: object) -> set[int]:
    indices = config.get(name) or []
    if not isinstance(indices, list) or not all(
        type(index) is int and 0 <= index < count for index in indices
    ):
        raise ValueError(
            f"{where}: {name} = {indices!r} is not a list of blocks 0-{count - 1}; restore its config.json"
        )
    return set(indices)


def _ffn_sites(index: int, text_pruned: bool) -> tuple[WidthSite, ...]:
    kinds = ("ffn_image",) if text_pruned else ("ffn_image", "ffn_text")
    return tuple(WidthSite(block=index, kind=kind) for kind in kinds)


def _renamed(architecture: Architecture, place: Place) -> dict[str, str]:
    """Our sub-module -> the released key, for the projections that are on at this place."""
    keys = architecture.released.projections if architecture.released else {}
    ours = architecture.projection_names
    return {
        ours[kind][part]: key for key, (kind, part) in keys.items() if kind in place.projections
    }


def _text_maps(architecture: Architecture, config: dict, layout: Layout) -> set[str]:
    name = architecture.projection_names["text"]["map"]
    indices = [place.index for place in layout.places if place.text_source is not None]
    return {f"{architecture.block_prefix(config, index)}{name}.weight" for index in indices}
