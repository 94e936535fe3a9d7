"""Files whose modulations are folded or unfolded: read a tensor at a time, written the same way,
all else copied as stored.

Three kinds: a full model (anything that `Weights` reads), one of our standalones, a bundle
(students, tuned variants).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import nn

from ...architectures import Architecture, architecture_named
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
from ...plan import PruningPlan, plan_from_value
from ...system.json_text import json_text
from ...system.progress import Progress
from ...system.schemas import read_text
from ...system.tensor_files import TensorEntry, TensorFile, write_tensor_stream
from ..bundle import PLAN_KEY, Bundle
from ..kinds import Kind, kind_of
from ..scales import SCALE_SUFFIXES
from ..standalone import STRUCTURE_KEY, standalone_structure
from ..stored_layout import STRUCTURE_TENSOR, common_prefix, open_layout
from ..teacher_hashes import TEACHER_KEY, without
from ..weights import Weights
from .basis import MARKED, mark_of
from .tables import Table, batches_of, conditionings, make_table, put_table, table_in

FOLDED_FROM = "ppcl_folded_from"
TUNED = "tuned."
Read = Callable[[str, torch.dtype | None], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Original:
    """A file, opened. stored: every tensor's name in it -> (open file, name there); prefix: of the
    transformer's names (a checkpoint's); plan: of a bundle or standalone; weights: of a full
    model."""

    path: Path
    architecture: Architecture
    config: dict
    stored: dict[str, tuple]
    metadata: dict[str, str]
    prefix: str = ""
    plan: PruningPlan | None = None
    weights: Weights | None = None

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
        """Of a bundle: those of the full model it was made from."""
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
        """A transformer's tensor; of a scaled one its values."""
        if self.weights is not None:
            return self.weights.read(name, dtype)
        tensor = self.raw(self.prefix + name)
        return tensor if dtype is None else tensor.to(dtype)

    def raw(self, name: str) -> torch.Tensor:
        file, key = self.stored[name]
        return file.read(key)

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
    """Raises ValueError for any other file."""
    path = Path(path)
    if kind_of(path) is Kind.BUNDLE:
        bundle = Bundle(path)
        stored = {name: (bundle.file, name) for name in bundle.file.keys()}
        return Original(
            path,
            bundle.architecture,
            bundle.plan.config,
            stored,
            bundle.file.metadata,
            plan=bundle.plan,
        )
    file = TensorFile(path) if path.is_file() else None
    prefix = common_prefix(file.keys()) if file is not None else ""
    stored = {
        prefix + name: place
        for name, place in open_layout(path)[0].items()
        if name != STRUCTURE_TENSOR
    }
    if file is not None:  # what a checkpoint holds beside the transformer stays
        stored |= {name: (file, name) for name in file.keys() if not name.startswith(prefix)}
    metadata = {} if file is None else file.metadata
    if structure := standalone_structure(path):
        plan = plan_from_value(structure, path)
        architecture = architecture_named(plan.architecture)
        return Original(path, architecture, plan.config, stored, metadata, prefix, plan=plan)
    weights = Weights(path)
    return Original(
        path, weights.architecture, weights.config, stored, metadata, prefix, weights=weights
    )


def check_foldable(architecture: Architecture, config: dict, where: object) -> None:
    """Raises ValueError for an architecture whose modulations read more than the timestep, and for
    a folded model."""
    reads = architecture.modulation_reads(config)
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
    """Where the time embedder of a modulation is: a tuned variant in a bundle has its own. "" is
    the base's."""
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
    """The time embedder alone, as an unfolded model has it."""
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
    """Activation and linear map, as they stand in a block."""
    weight, bias = (read(f"{name}.{leaf}", dtype).to(device) for leaf in ("weight", "bias"))
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
    return nn.Sequential(nn.SiLU(), linear).requires_grad_(False)


def give_base(model: nn.Module, base: Path, path: Path) -> None:
    """A model on a table gets the timesteps that it lacks from the file that it was folded from,
    when it is asked for them. Nothing happens to others."""
    inputs = table_inputs(model)
    if inputs is None:
        return
    folding = open_original(path).folding
    mark = folding.mark if folding else ""
    maps = table_maps(model)

    def more(timesteps: list[float]) -> None:
        original, parameter = open_original(base), next(iter(maps.values())).weight
        check_mark(original, mark, path)
        found = original_table(
            original, timesteps, inputs, maps, parameter.dtype, str(parameter.device)
        )
        put_table(maps, inputs, table_in(maps, inputs).joined(found))

    inputs.more = more


def original_table(
    original: Original, timesteps, inputs: TableInputs, maps, dtype: torch.dtype, device: str
) -> Table:
    """One pass over the modulations of the file for these timesteps, for the numbers of rows that
    the model's maps know."""
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


@dataclass(frozen=True, kw_only=True)
class Folded:
    """What takes the place of a file's modulations. maps: module -> how its weight is made; inputs:
    names of the tensors that time embedders get -> the tensors."""

    folding: Folding
    dtype: torch.dtype
    maps: dict[str, Callable[[], torch.Tensor]]
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)


def write_folded(path: Path, original: Original, folded: Folded) -> Path:
    """Every other tensor as it is stored, biases of a basis too; a table's values hold theirs."""
    replaced = _entries_by_name(original, folded)
    entries = [replaced.get(name, _copied(original, name)) for name in original.stored]
    entries = [entry for entry in entries if entry is not None]
    entries += [_held(original.prefix + name, tensor) for name, tensor in folded.inputs.items()]
    config = {**original.config, FOLDING: folded.folding.to_config()}
    plan = _folded_plan(original, config)
    metadata = {
        **original.metadata,
        "format": "pt",
        FOLDED_FROM: json_text({"mark": original.mark}),
    }
    if original.is_bundle:
        metadata[PLAN_KEY] = plan.to_json()
        if TEACHER_KEY in metadata:
            metadata[TEACHER_KEY] = without(metadata[TEACHER_KEY], original.base_modulations)
    else:
        structure = plan.to_json().encode()
        entries.append(
            _held(
                original.prefix + STRUCTURE_TENSOR, torch.tensor(list(structure), dtype=torch.uint8)
            )
        )
        metadata |= (
            {"config": json_text(config)}
            if original.plan is None
            else {STRUCTURE_KEY: plan.to_json()}
        )
    _write(path, entries, metadata)
    return path


def write_unfolded(path: Path, folded: Original, original: Original) -> Path:
    """The folded file's tensors with the original's modulations, and the original's own
    description."""
    check_is_original(original, folded)
    kept = {name for name in original.stored if not _of_modulation(original, name)}
    if missing := sorted(kept - folded.stored.keys()):
        raise ValueError(
            f"{folded.path} lacks {missing[0]}, which {original.path} has; it was changed since it was folded"
        )
    entries = [_copied(folded if name in kept else original, name) for name in original.stored]
    if original.plan is not None and not original.is_bundle:
        name = original.prefix + STRUCTURE_TENSOR
        entries.append(_held(name, TensorFile(original.path).read(name)))
    described = {} if original.plan is not None else {"config": json_text(original.config)}
    _write(path, entries, original.metadata or {**described, "format": "pt"})
    return path


def check_is_original(original: Original, folded: Original) -> None:
    """Raises ValueError when the folded file was not made from this one."""
    if FOLDED_FROM not in folded.metadata:
        raise ValueError(
            f"{folded.path} was not made by folding a file, so there are no original weights to give back"
        )
    if original.folding is not None:
        raise ValueError(
            f"{original.path} is folded itself; give the file that {folded.path} was folded from"
        )
    check_mark(
        original,
        read_text(_FoldedFrom, folded.metadata[FOLDED_FROM], f"{folded.path}: {FOLDED_FROM}").mark,
        folded.path,
    )


@dataclass(frozen=True)
class _FoldedFrom:
    """What a folded file says of its original."""

    mark: str


def check_mark(original: Original, mark: str, where: object) -> None:
    if original.mark != mark:
        raise ValueError(
            f"{original.path} is another model than {where} was folded from ({original.mark[:8]}, not {mark[:8]}); "
            "give the very file"
        )


def _folded_plan(original: Original, config: dict) -> PruningPlan:
    """Of a full model: one that replaces nothing, so that a host knows the file by its
    structure."""
    if original.plan is not None:
        return original.plan.with_parts(config=config)
    architecture = original.architecture
    blocks = architecture.num_blocks(config)
    return PruningPlan(
        architecture=architecture.name, config=config, num_blocks=blocks, fingerprint=""
    )


def _entries_by_name(original: Original, folded: Folded) -> dict[str, TensorEntry | None]:
    """Stored name -> what is written instead; None: nothing."""
    found: dict[str, TensorEntry | None] = {}
    for name, make in folded.maps.items():
        outputs, key = original.shape(f"{name}.weight")[0], original.prefix + name
        shape = (outputs, folded.folding.columns)
        found |= {
            key + ending: None
            for ending in (*SCALE_SUFFIXES, ".scale_input", ".input_scale", ".comfy_quant")
        }
        found[f"{key}.weight"] = TensorEntry(f"{key}.weight", folded.dtype, shape, make)
        if folded.folding.form == "table":
            found[f"{key}.bias"] = None
    return found


def _of_modulation(original: Original, name: str) -> bool:
    return name.removeprefix(original.prefix).rpartition(".")[0] in original.modulation_set


def _copied(original: Original, name: str) -> TensorEntry:
    file, key = original.stored[name]
    return TensorEntry(name, file.dtype(key), tuple(file.shape(key)), lambda: file.read(key))


def _held(name: str, tensor: torch.Tensor) -> TensorEntry:
    return TensorEntry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _write(path: Path, entries: list[TensorEntry], metadata: dict[str, str]) -> None:
    bar = Progress(total=len(entries), desc=path.stem, unit="tensor")

    def counted(entry: TensorEntry) -> TensorEntry:
        def read() -> torch.Tensor:
            bar.update()
            return entry.read()

        return TensorEntry(entry.name, entry.dtype, entry.shape, read)

    with bar:
        write_tensor_stream(path, [counted(entry) for entry in entries], metadata)
