"""Folded modulations on the host's modules, made so that the host's offloading and LoRA reach them.

A LoRA changes the weight W, but a folded map stores only W P (P: a basis, or silu(conditioning) at a
table's timesteps). The host asks a module for its weight in the form that patches are made for, and
gives it back changed (`adapters.PatchedWhole`); there the change dW becomes dW P. This works for
every form in which a file brings dW, and wherever the host patches.
"""

from __future__ import annotations

from functools import partial

import comfy.ops
import torch
import torch.nn.functional as F
from torch import nn

from ...ppcl_engine.architectures.folded import (
    FOLDING,
    PRECISIONS,
    BasisInputs,
    Carried,
    Folding,
    TableInputs,
    append_carried,
    coefficients,
    drop_carried,
    picked,
)
from .adapters import PatchedWhole, half_of


class Basis(BasisInputs):
    """The engine's; `projection` is P."""

    def projection(self) -> torch.Tensor:
        return self.directions


class Table(TableInputs):
    """The engine's table, which grows while it is used."""

    embedder: tuple[nn.Module, ...] = ()
    """the host's time embedder, in a tuple so that it does not become a sub-module"""
    batches: tuple[int, ...] = (1,)
    """numbers of rows that each timestep's values were computed for"""

    def __init__(self, inputs: int, precision: torch.dtype):
        super().__init__(inputs, precision)
        self.stored: frozenset[float] | None = None  # timesteps that came with the file
        self.asked: set[tuple[float, tuple[int, ...]]] = (
            set()
        )  # others, with the numbers of rows that they were made for

    def ask(self, missing: list[float]) -> None:
        """Called for timesteps that the table lacks. Those of the schedule were filled in before
        sampling (`modulation_tables`), so the sampler chose these on its way."""
        raise ValueError(
            f"the model's table has no timestep {missing[0]:.6g}, which this sampler chose on its way: choose a sampler that "
            "keeps to its schedule, or fold with form basis"
        )

    def projection(self) -> torch.Tensor:
        """silu(conditioning) [width, columns] for every column of the table, in float32."""
        (embedder,) = self.embedder
        device = next(embedder.parameters()).device
        like = torch.empty(0, device=device)
        with torch.no_grad():
            rows = F.silu(embedder.forward(self.timesteps.to(device, torch.float32), like))
        return rows.T.repeat(1, len(self.batches))


class FoldedMap(PatchedWhole, comfy.ops.manual_cast.Linear):
    """What the two forms share."""

    inputs: tuple[Basis | Table, ...] = ()
    """the model's own, in a tuple so that it does not become a sub-module of every map"""

    def _load_from_state_dict(self, *arguments, **named):
        """torch's own method. A newer host leaves its maps without weights until they are loaded,
        unless this is overridden; these maps are small, and change their size while in use."""
        nn.Linear._load_from_state_dict(self, *arguments, **named)

    def projection(self, like: torch.Tensor) -> torch.Tensor:
        return self.inputs[0].projection().to(like.device, like.dtype)


class BasisMap(FoldedMap):
    """A map that stores W P. Patches see W P P^T, all that is left of W; as P is orthonormal, what
    they do not change comes back as it was."""

    def forward_comfy_cast_weights(self, carried: torch.Tensor) -> torch.Tensor:
        exact = coefficients(carried)
        weight, bias, stream = comfy.ops.cast_bias_weight(self, exact, offloadable=True)
        outputs = F.linear(exact, weight, bias).to(carried.dtype)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return outputs

    def whole(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        return stored @ self.projection(stored).T if name == "weight" else stored

    def left(self, name: str, whole: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        return whole @ self.projection(whole) if name == "weight" else whole


class TableMap(FoldedMap):
    """A map that looks its outputs up. They are copied, so they keep their bits; the bias is zero
    until a LoRA changes it. Patches see zeros in place of W, which a few outputs do not tell."""

    batches: tuple[int, ...] = (1,)

    def forward_comfy_cast_weights(self, carried: torch.Tensor) -> torch.Tensor:
        weight, bias, stream = comfy.ops.cast_bias_weight(self, carried, offloadable=True)
        outputs = picked(weight, carried, self.batches) + bias
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return outputs

    def whole(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        return (
            stored.new_zeros(stored.shape[0], self.inputs[0].width) if name == "weight" else stored
        )

    def left(self, name: str, whole: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        return (
            stored.to(whole.device, whole.dtype) + whole @ self.projection(whole)
            if name == "weight"
            else whole
        )


MAPS: dict[str, type[FoldedMap]] = {"basis": BasisMap, "table": TableMap}


def inputs_of(folding: Folding, width: int, dtype: torch.dtype) -> Basis | Table:
    """What the folded modulations of a model read. dtype: of the model's computations and of a
    table's values; the small maps of a basis are kept in float32."""
    if folding.form == "basis":
        inputs = Basis(width, folding.inputs)
    else:
        inputs = Table(folding.inputs, PRECISIONS[folding.precision])
        inputs.batches = folding.batches
    inputs.width, inputs.maps_dtype = width, torch.float32 if folding.form == "basis" else dtype
    return inputs


def fold_block(
    block: nn.Module, modulations: tuple[str, ...], folding: Folding, inputs: Basis | Table, device
) -> nn.Module:
    """Puts folded maps into the modulations of the host's block. A name such as "img_mod.1" stands
    behind its activation "img_mod.0", which is replaced too."""
    for name in modulations:
        linear, kept = block.get_submodule(name), {"dtype": inputs.maps_dtype, "device": device}
        new = folded_map(MAPS[folding.form], folding, linear.out_features, inputs, kept)
        block.set_submodule(
            name.rpartition(".")[0], nn.Sequential(Carried(linear.in_features), new)
        )
    return block


def folded_map(
    kind: type[FoldedMap], folding: Folding, outputs: int, inputs: Basis | Table, options: dict
) -> FoldedMap:
    new = kind(folding.columns, outputs, **options)
    new.inputs = (inputs,)
    if folding.form == "table":
        new.batches = folding.batches
    return new.requires_grad_(False)


def renewed(transformer: nn.Module) -> None:
    """Replaces folded maps that have changed their size by new ones: hosts note a map's first size
    and go on with it."""
    for name, module in [
        (n, m) for n, m in transformer.named_modules() if isinstance(m, FoldedMap)
    ]:
        new = type(module)(module.in_features, module.out_features, device="meta")
        new.weight, new.bias, new.inputs = module.weight, module.bias, module.inputs
        if isinstance(module, TableMap):
            new.batches = module.batches
        transformer.set_submodule(name, new.train(module.training))


def cut(whole: FoldedMap, folding: Folding) -> FoldedMap:
    """A folded map for the first half of the outputs."""
    options = {"dtype": whole.weight.dtype, "device": whole.weight.device}
    return folded_map(
        half_of(type(whole)), folding, whole.out_features // 2, whole.inputs[0], options
    )


def attach(embedder: nn.Module, final: nn.Module, inputs: Basis | Table) -> None:
    """Makes the host's time embedder append what the blocks' folded maps read, and hides that from
    the final layer."""
    if isinstance(inputs, Table):
        inputs.embedder = (embedder,)
    setattr(embedder, FOLDING, inputs)
    embedder.register_forward_hook(append_carried)
    final.register_forward_pre_hook(partial(drop_carried, inputs.width))


def inputs_in(transformer: nn.Module) -> Basis | Table | None:
    """None where nothing is folded."""
    return next(
        (module for module in transformer.modules() if isinstance(module, Basis | Table)), None
    )


def folding_in(transformer: nn.Module) -> Folding | None:
    """As it is now: a table grows while it is used."""
    inputs = inputs_in(transformer)
    if inputs is None:
        return None
    if isinstance(inputs, Basis):
        return Folding(form="basis", inputs=inputs.directions.shape[1])
    return Folding(form="table", inputs=len(inputs.timesteps), batches=inputs.batches)
