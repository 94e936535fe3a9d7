"""One variant as a file of its own, in our layout: teacher indices kept, its structure inside, for our loaders."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from .architectures import Architecture, Part, architecture_named
from .bundle import STRUCTURE_TENSOR
from .checkpoint import as_tensor
from .comfyui_layout import variant_parts
from .files import TensorEntry, write_tensor_stream
from .layout import Layout, layout_of
from .plan import PruningPlan, TextGroup, Variant
from .progress import Progress
from .quantization import FP8, FP8_SCALE, TwoParts, scaled_fp8
from .surgery import empty_block

GUARD_SHAPE = (0, 1)
STRUCTURE_KEY = "ppcl_structure"


@dataclass(frozen=True)
class Source:
    """A tensor to be read when it is written."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def check_file_name(name: str) -> None:
    """Raises ValueError for a name that is a path: files go where the run folder says."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"--name {name!r}: letters, digits, '-' and '_' only; --run says where it goes")


def write_standalone(
    path: Path, sources: dict[str, Source], plan: PruningPlan, variant: Variant, dtype: torch.dtype
) -> Path:
    """ComfyUI's names, teacher indices, the structure as a tensor (hosts drop metadata), and a guard of an impossible shape: a stock
    host would build what this file has not, and leave out what it has, without a word."""
    structure = structure_of(plan, variant).to_json()
    architecture, layout = architecture_named(plan.architecture), layout_of(plan, variant)
    extra = {STRUCTURE_TENSOR: as_tensor(structure)}
    if guard := guard_name(plan, layout):
        extra[guard] = torch.zeros(GUARD_SHAPE, dtype=torch.uint8)
    named = joined_sources(sources, variant_parts(architecture, plan.config, layout, sources))
    write_sources(path, named, dtype, {STRUCTURE_KEY: structure, "format": "pt"}, extra)
    return path


def guard_name(plan: PruningPlan, layout: Layout) -> str | None:
    """The first tensor of the full model that the variant has not; a stock host looks for it."""
    architecture, places = architecture_named(plan.architecture), {place.index: place for place in layout.places}
    for index in range(plan.num_blocks):
        with torch.device("meta"):
            full = architecture.build_block(plan.config, index).state_dict()
            own = empty_block(architecture, plan.config, places[index], {}).state_dict() if index in places else {}
        if vacated := sorted(full.keys() - own.keys()):
            prefix = architecture.block_prefix(plan.config, index)
            return architecture.to_comfyui(prefix + vacated[0], [prefix + name for name in full]).name
    return None


def structure_of(plan: PruningPlan, variant: Variant) -> PruningPlan:
    """The plan of a file that holds this variant alone: everything in it is on."""
    switches = [plan.site(name) for name in layout_of(plan, variant).sites]
    sites = [site for switch in switches for site in (switch.sites if isinstance(switch, TextGroup) else (switch,))]
    kept = tuple(plan.intervals_of(variant))
    return replace(plan, intervals=kept, sites=tuple(replace(s, fitted=()) for s in sites), variants=())


def marks_of(architecture: Architecture, config: dict) -> dict[str, torch.Tensor]:
    """Empty tensors by which ComfyUI knows models of this configuration that shapes do not tell apart."""
    return {mark: torch.empty(0) for mark, entry in architecture.marks.items() if config.get(entry)}


def hints_of(plan: PruningPlan, indices: list[int], config: dict) -> torch.Tensor:
    """Of a file that counts its blocks anew: which of the teacher's they are. For loaders that drop metadata, where LoRAs
    would land on wrong blocks."""
    return as_tensor({"indices": indices, "blocks": plan.num_blocks, "config": config})


def comfyui_sources(architecture: Architecture, sources: dict[str, Source]) -> dict[str, Source]:
    """The same tensors by ComfyUI's names, some of which hold several of diffusers'."""
    return joined_sources(sources, {key: architecture.to_comfyui(key, sources) for key in sources})


def joined_sources(sources: dict[str, Source], parts: dict[str, Part]) -> dict[str, Source]:
    """Several of diffusers' tensors as one, where `parts` say so; of a map that was cut, those that are left."""
    tensors: dict[str, dict[int, tuple[Source, int, int]]] = {}
    for key, source in sources.items():
        part = parts[key]
        pieces = tensors.setdefault(part.name, {})
        for position, piece in enumerate(part.pieces):
            pieces[piece] = (source, position, len(part.pieces))
    return {name: _joined([pieces[n] for n in sorted(pieces)]) for name, pieces in tensors.items()}


def _joined(pieces: list[tuple[Source, int, int]]) -> Source:
    """One tensor of equal pieces: (tensor, which of its pieces, of how many)."""
    source, position, of = pieces[0]
    if len(pieces) == 1:
        return source

    def read() -> torch.Tensor:
        cut = {s: s.read().chunk(n) for s, n in dict.fromkeys((s, n) for s, _, n in pieces)}
        return torch.cat([cut[s][position] for s, position, _ in pieces])

    return Source((source.shape[0] // of * len(pieces), *source.shape[1:]), read)


def write_sources(
    path: Path,
    sources: dict[str, Source],
    dtype: torch.dtype,
    metadata: dict[str, str],
    extra: dict[str, torch.Tensor] | None = None,
    scaled: bool = False,
) -> None:
    """A safetensors file of `sources` in `dtype`, read one at a time, and `extra` as they are. scaled: matrices in fp8 with a
    scale each, as ComfyUI reads them."""
    bar = Progress(total=len(sources), desc=path.stem, unit="tensor")

    def counted(source: Source) -> torch.Tensor:
        bar.update()
        return source.read()

    entries = []
    for key, source in sources.items():
        read = partial(counted, source)
        entries += (
            _scaled_entries(key, source.shape, read)
            if scaled and _is_matrix(key, source)
            else [TensorEntry(key, dtype, source.shape, read)]
        )
    entries += [TensorEntry(key, t.dtype, tuple(t.shape), lambda t=t: t) for key, t in (extra or {}).items()]
    with bar:
        write_tensor_stream(path, entries, metadata)


def _is_matrix(key: str, source: Source) -> bool:
    """Of a linear map: all others that have two dimensions are tables of embeddings."""
    return len(source.shape) == 2 and key.endswith(".weight") and "embedding.weight" not in key


def _scaled_entries(key: str, shape: tuple[int, ...], read: Callable[[], torch.Tensor]) -> list[TensorEntry]:
    parts, scale = TwoParts(read, scaled_fp8), key.removesuffix(".weight") + FP8_SCALE
    return [TensorEntry(key, FP8, shape, parts.take_first), TensorEntry(scale, torch.float32, (), parts.take_second)]
