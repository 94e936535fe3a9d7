"""Folds modulations away while a model is loaded: into an empty table that sampling will fill, or at
once into a basis."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import comfy.model_management
import comfy.ops
import comfy.utils
import torch
import torch.nn.functional as F

from ...ppcl_engine.architectures.folded import FOLDING, Folding
from ...ppcl_engine.models.folding.basis import MARKED, Curve, TimeBasis, useful_ranks
from ...ppcl_engine.settings.convert_settings import FoldConfig
from ...ppcl_engine.system.tensor_files import TensorFile, write_tensors
from ..host import host_named
from ..host.modulations import Fold, Modulations
from ..paths import tables_folder

BOUND = FoldConfig.bound
BASIS_KEY, NOTE_KEY = "ppcl_basis", "note"
DIRECTIONS, TIMESTEPS = "directions", "timesteps"


def _name(modulations: Modulations, part: str) -> str:
    return f"{modulations.architecture.time_embedder}.{FOLDING}.{part}"


def make_fold(form: str, modulations: Modulations) -> Fold:
    return _empty_table(modulations) if form == "table" else _basis(modulations)


def _empty_table(modulations: Modulations) -> Fold:
    """A table without timesteps: which ones are needed is only known when sampling starts."""
    folding = Folding(form="table", inputs=0, mark=modulations.mark)
    tensors = {_name(modulations, TIMESTEPS): torch.zeros(0)}
    for name in modulations.stored:
        tensors[f"{name}.weight"] = torch.zeros(modulations.shape(name)[0], 0)
    return Fold(folding, tensors, later=modulations)


def _basis(modulations: Modulations) -> Fold:
    """The basis of these modulations; read from models/ppcl/tables if this model was folded before."""
    key = hashlib.sha256(f"{modulations.mark} {modulations.shapes} {BOUND}".encode()).hexdigest()
    path = tables_folder() / f"{key[:24]}-basis.safetensors"
    if not path.exists():
        _write_basis(path, key, modulations)
    file = TensorFile(path)
    if file.metadata.get(BASIS_KEY) != key:
        raise ValueError(
            f"{path} is the basis of another model; delete it, and it will be made again"
        )
    tensors = file.read_all()
    folding = Folding(
        form="basis", inputs=tensors[_name(modulations, DIRECTIONS)].shape[1], mark=modulations.mark
    )
    return Fold(
        folding, tensors, sum(t.nbytes for t in tensors.values()), (file.metadata[NOTE_KEY],)
    )


def _write_basis(path: Path, key: str, modulations: Modulations) -> None:
    """Two passes over the stored modulations, one in memory at a time: the first measures the error
    of each rank, the second folds with the smallest one within the bound."""
    device = comfy.model_management.get_torch_device()
    width = modulations.embedder[
        f"{modulations.architecture.time_embedder}.timestep_embedder.linear_2.weight"
    ].shape[0]
    inputs = partial(inputs_at, modulations, width, device=device)
    basis = TimeBasis(inputs, useful_ranks(width), device)
    curve = Curve(basis.ranks)
    bar = comfy.utils.ProgressBar(2 * len(modulations.stored))
    for name in _each(modulations, bar):
        curve.add(name, basis.errors(*modulations.values(name)))
    rank = curve.smallest_rank(BOUND)
    row = curve.ranks.index(rank)
    tensors = {_name(modulations, DIRECTIONS): basis.of_rank(rank).cpu()}
    for name in _each(modulations, bar):
        weight, bias = modulations.values(name)
        tensors |= {f"{name}.weight": basis.folded(weight, rank).cpu(), f"{name}.bias": bias}
    note = f"folded, basis of rank {rank}: error {curve.mean[row]:.2%} mean, {curve.worst[row]:.2%} worst"
    write_tensors(path, tensors, {BASIS_KEY: key, NOTE_KEY: note, "format": "pt"})


def _each(modulations: Modulations, bar):
    for name in modulations.stored:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield name
        bar.update(1)


@torch.no_grad()
def inputs_at(
    modulations: Modulations,
    width: int,
    timesteps: torch.Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """silu(conditioning) [timesteps, width] in float32, as a model of this precision computes it."""
    operations = comfy.ops.disable_weight_init
    host = host_named(modulations.architecture.name)
    embedder = host.time_embedder(width, dtype=dtype, device=device, operations=operations)
    prefix = f"{modulations.architecture.time_embedder}."
    # by name: the embedder's own maps may have no weights until they are loaded
    names = [name for name in modulations.embedder if name.endswith(MARKED)]
    embedder.load_state_dict(
        {n.removeprefix(prefix): modulations.read_embedder(n, dtype) for n in names}
    )
    embedder.to(device)
    return F.silu(
        embedder.forward(timesteps.to(device), torch.empty(0, dtype=dtype, device=device))
    ).float()
