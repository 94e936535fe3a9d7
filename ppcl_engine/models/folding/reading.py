"""Files with folded or unfolded modulations, and what is read from them.

Three kinds: a full model (anything that `Weights` reads), one of our standalones, a bundle
(students, tuned variants).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import nn

from ...architectures import Architecture
from ...architectures.base import modulation_names
from ...architectures.folded import (
    FOLDING,
    Folding,
    TableInputs,
    folding_of,
    table_inputs,
    table_maps,
    unfolded_config,
)
from ...plan import PruningPlan
from ...system.gguf_files import is_gguf
from ...system.progress import Progress
from ...system.tensor_files import TensorFile
from ..bundle import PLAN_KEY, Bundle
from ..kinds import open_convertible
from ..real_values import RealValues
from ..standalone import Standalone
from ..stored_layout import STRUCTURE_TENSOR, common_prefix, open_layout
from ..teacher_hashes import TEACHER_KEY
from ..weights import Weights
from .basis import MARKED, mark_of
from .tables import Table, batches_of, conditionings, make_table, put_table, table_in

TUNED = "tuned."
Read = Callable[[str, torch.dtype | None], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Original:
    """An opened file."""

    path: Path
    architecture: Architecture
    config: dict
    stored: dict[str, tuple]
    """every tensor's name -> (open file, name in it)"""
    metadata: dict[str, str]
    """the file's"""
    prefix: str = ""
    """before the transformer's names, in a checkpoint"""
    plan: PruningPlan | None = None
    """of a bundle or standalone"""
    model: Weights | Standalone | None = None
    """the file as a model, unless it is a bundle"""

    @property
    def is_bundle(self) -> bool:
        return PLAN_KEY in self.metadata

    @property
    def folding(self) -> Folding | None:
        return folding_of(self.config)

    @cached_property
    def modulations(self) -> list[str]:
        """Names of the linear maps, such as `transformer_blocks.3.img_mod.1`."""
        return modulation_names(
            (name.removeprefix(self.prefix) for name in self.stored), self.architecture
        )

    @cached_property
    def base_modulations(self) -> frozenset[str]:
        """In a bundle: the modulations of the full model that it was made from."""
        return frozenset(
            modulation_names(json.loads(self.metadata[TEACHER_KEY]), self.architecture)
        )

    @cached_property
    def modulation_set(self) -> frozenset[str]:
        return frozenset(self.modulations)

    def shape(self, name: str) -> tuple[int, ...]:
        file, key = self.stored[self.prefix + name]
        return file.shape(key)

    def dtype(self, name: str) -> torch.dtype:
        file, key = self.stored[self.prefix + name]
        return file.dtype(key)

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A transformer's tensor; a quantised one as its real values."""
        if isinstance(self.model, Weights):
            return self.model.read(name, dtype)
        tensor = self.model.read(name) if self.model else self._values.read(self.prefix + name)
        return tensor if dtype is None else tensor.to(dtype)

    @cached_property
    def _values(self) -> RealValues:
        return RealValues(TensorFile(self.path))

    @cached_property
    def mark(self) -> str:
        embedder = f"{self.architecture.time_embedder}."
        embedders = (name.removeprefix(self.prefix) for name in self.stored if embedder in name)
        names = [name + leaf for name in self.modulations for leaf in MARKED]
        return mark_of(
            [*names, *(name for name in embedders if name.endswith(MARKED))], self._first_rows
        )

    def _first_rows(self, name: str, rows: int | None) -> torch.Tensor:
        file, key = self.stored[self.prefix + name]
        return file.read(key, rows) if isinstance(file, TensorFile) else file.read(key)[:rows]


def open_original(path: Path) -> Original:
    """Raises ValueError for any other kind of file."""
    path = Path(path)
    if is_gguf(path):
        raise ValueError(
            f"{path} is GGUF, whose modulations cannot be folded; fold the model in safetensors"
        )
    model = open_convertible(path)
    file = TensorFile(path) if path.is_file() else None
    prefix = common_prefix(file.keys()) if file is not None else ""
    stored = {
        prefix + name: place
        for name, place in open_layout(path)[0].items()
        if name != STRUCTURE_TENSOR
    }
    if file is not None:  # what a checkpoint holds beside the transformer stays
        stored |= {name: (file, name) for name in file.keys() if not name.startswith(prefix)}
    return Original(
        path,
        model.architecture,
        model.config,
        stored,
        {} if file is None else file.metadata,
        prefix,
        model.plan,
        model=None if isinstance(model, Bundle) else model,
    )


def check_foldable(architecture: Architecture, config: dict, where: object) -> None:
    """Raises ValueError for modulations that read more than the timestep, and for a model that is
    already folded."""
    reads = architecture.modulation_reads(config)
    if not architecture.timestep_modulations and reads == ("the timestep",):
        raise ValueError(
            f"{where} is {architecture.name}, whose modulations are small beside its blocks: folding them would "
            "save little and is not written; use it as it is"
        )
    if not architecture.timestep_modulations or reads != ("the timestep",):
        raise ValueError(
            f"{where} is {architecture.name}, whose modulations read {_listed(reads)}: only those that read the timestep "
            "alone can be folded (Qwen-Image and its edit models)"
        )
    if FOLDING in config:
        raise ValueError(
            f"{where} is folded already ({config[FOLDING]['form']}); unfold it first with --form off"
        )


def _listed(names: tuple[str, ...]) -> str:
    """ "a, b and c" """
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def embedder_prefix(name: str, names: Iterable[str], architecture: Architecture) -> str:
    """Prefix of the time embedder that a modulation belongs to: a tuned variant in a bundle may
    have its own; "" is the base's."""
    if not name.startswith(TUNED):
        return ""
    prefix = ".".join(name.split(".")[:2]) + "."
    return prefix if any(n.startswith(prefix + architecture.time_embedder) for n in names) else ""


@torch.no_grad()
def open_embedder(
    architecture: Architecture,
    config: dict,
    read: Read,
    prefix: str,
    dtype: torch.dtype,
    device: str,
) -> nn.Module:
    """Only the time embedder, as in an unfolded model."""
    with torch.device("meta"):
        embedder = architecture.build_outer(unfolded_config(config)).get_submodule(
            architecture.time_embedder
        )
    names = embedder.state_dict()
    state = {
        name: read(f"{prefix}{architecture.time_embedder}.{name}", dtype).to(device)
        for name in names
    }
    embedder.load_state_dict(state, assign=True)
    return embedder.eval().requires_grad_(False)


def open_modulation(read: Read, name: str, dtype: torch.dtype, device: str) -> nn.Module:
    """Activation and linear map, as in a block."""
    weight, bias = (read(f"{name}.{leaf}", dtype).to(device) for leaf in ("weight", "bias"))
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
    return nn.Sequential(nn.SiLU(), linear).requires_grad_(False)


def give_base(model: nn.Module, base: Path, path: Path) -> None:
    """Lets a table model read missing timesteps, when it needs them, from the file that it was
    folded from.

    Other models are left alone.
    """
    inputs = table_inputs(model)
    if inputs is None:
        return
    folding = open_original(path).folding
    mark = folding.mark if folding else ""
    maps = table_maps(model)

    def more(timesteps: list[float]) -> None:
        original, parameter = open_original(base), next(iter(maps.values())).weight
        check_mark(original, mark, path)
        table = original_table(
            original, timesteps, inputs, maps, parameter.dtype, str(parameter.device)
        )
        put_table(maps, inputs, table_in(maps, inputs).joined(table))

    inputs.more = more


def original_table(
    original: Original, timesteps, inputs: TableInputs, maps, dtype: torch.dtype, device: str
) -> Table:
    """A table for these timesteps, and for the numbers of rows that the model's maps know; takes
    one pass over the file's modulations."""
    architecture, config = original.architecture, original.config
    embedder = open_embedder(architecture, config, original.read, "", dtype, device)

    def condition(t: torch.Tensor) -> torch.Tensor:
        return architecture.time_conditioning(embedder, t.to(device, inputs.precision), dtype)

    batches = batches_of(architecture, config, next(iter(maps.values())).batches)
    given = conditionings(condition, timesteps, batches)
    names = Progress(maps, desc="table", unit="modulation")
    return make_table(
        (
            (name, partial(open_modulation, original.read, name, dtype, device), given)
            for name in names
        ),
        timesteps,
    )


def check_mark(original: Original, mark: str, where: object) -> None:
    if original.mark != mark:
        raise ValueError(
            f"{original.path} is another model than {where} was folded from ({original.mark[:8]}, not {mark[:8]}); "
            "give the file that it was folded from"
        )
