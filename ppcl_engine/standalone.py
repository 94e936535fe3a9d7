"""One variant as a file of its own, in our layout: teacher indices kept, its structure inside, for our loaders."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from .bundle import STRUCTURE_TENSOR
from .files import TensorEntry, write_tensor_stream
from .layout import layout_of
from .plan import PruningPlan, TextGroup, Variant

GUARD_TENSOR = "ppcl_needs_its_node_pack"
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
    """Teacher indices, the structure as a tensor (hosts drop metadata), and a guard of an impossible shape."""
    structure = structure_of(plan, variant).to_json()
    encoded = torch.tensor(list(structure.encode()), dtype=torch.uint8)
    extra = {STRUCTURE_TENSOR: encoded, GUARD_TENSOR: torch.zeros(0, 1, dtype=torch.uint8)}
    write_sources(path, sources, dtype, {STRUCTURE_KEY: structure, "format": "pt"}, extra)
    return path


def structure_of(plan: PruningPlan, variant: Variant) -> PruningPlan:
    """The plan of a file that holds this variant alone: everything in it is on."""
    switches = [plan.site(name) for name in layout_of(plan, variant).sites]
    sites = [site for switch in switches for site in (switch.sites if isinstance(switch, TextGroup) else (switch,))]
    kept = tuple(plan.intervals_of(variant))
    return replace(plan, intervals=kept, sites=tuple(replace(s, fitted=()) for s in sites), variants=())


def write_sources(
    path: Path,
    sources: dict[str, Source],
    dtype: torch.dtype,
    metadata: dict[str, str],
    extra: dict[str, torch.Tensor] | None = None,
) -> None:
    """A safetensors file of `sources` in `dtype`, read one at a time, and `extra` as they are."""
    bar = tqdm(total=len(sources), desc=path.stem, unit="tensor")

    def counted(source: Source) -> torch.Tensor:
        bar.update()
        return source.read()

    entries = [TensorEntry(key, dtype, s.shape, lambda s=s: counted(s)) for key, s in sources.items()]
    entries += [TensorEntry(key, t.dtype, tuple(t.shape), lambda t=t: t) for key, t in (extra or {}).items()]
    with bar:
        write_tensor_stream(path, entries, metadata)
