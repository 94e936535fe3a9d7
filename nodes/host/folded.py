"""Folded modulations on the host's modules: the engine's forms, made so that its offloading and
LoRA reach them.

A LoRA changes W, of which a folded map holds W P (P: a basis, or silu(conditioning) at a table's
timesteps). The host asks a module for its weight in the form that patches know and gives it back
changed; there dW becomes dW P, in whatever form a file brings dW, and whether the host patches on
the device or on the way to it.
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
    """The engine's; `embedder` (in a tuple: it is no part of this module) makes the conditioning of
    each timestep."""

    embedder: tuple[nn.Module, ...] = ()
    batches: tuple[int, ...] = (1,)

    def __init__(self, inputs: int, precision: torch.dtype):
        super().__init__(inputs, precision)
        self.stored: frozenset[float] | None = None  # timesteps that came with the file
        self.asked: set[tuple[float, tuple[int, ...]]] = (
            set()
        )  # others, with the numbers of rows that they were made for

    def ask(self, missing: list[float]) -> None:
        """The schedule's were looked up before sampling (`tables`), so these were chosen since."""
        raise ValueError(
            f"the model's table has no timestep {missing[0]:.6g}, which this sampler chose on its way: choose a sampler that "
            "keeps to its schedule, or fold with form basis"
        )

    def projection(self) -> torch.Tensor:
        """silu(conditioning) [width, columns] of every column of the table, in float32"""
        (embedder,) = self.embedder
        device = next(embedder.parameters()).device
        like = torch.empty(0, device=device)
        with torch.no_grad():
            rows = F.silu(embedder.forward(self.timesteps.to(device, torch.float32), like))
        return rows.T.repeat(1, len(self.batches))


class FoldedMap(PatchedWhole, comfy.ops.manual_cast.Linear):
    """What both forms share. `inputs` (in a tuple, since every map has the same): the model's
    `Basis` or `Table`."""

    inputs: tuple[Basis | Table, ...] = ()

    def _load_from_state_dict(self, *arguments, **named):
        """torch's own: hosts that leave a map without a weight until it is loaded do so only where
        theirs is not overridden. These are small, and change their size while they are used."""
        nn.Linear._load_from_state_dict(self, *arguments, **named)

    def projection(self, like: torch.Tensor) -> torch.Tensor:
        return self.inputs[0].projection().to(like.device, like.dtype)


class BasisMap(FoldedMap):
    """Patches see W P P^T, all that is left of W; P is orthonormal, so that nothing else
    changes."""

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
    """Values are copied, so they keep their bits; the bias is zero until a LoRA changes it. Patches
    see zeros: W cannot be had from a few values."""

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
    """dtype: that the model computes in, of a table's values too. A basis' maps are float32, they
    are so small."""
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
    """The host's block with small maps in its modulations ("img_mod.1": behind an activation
    "img_mod.0")."""
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
    """Maps that changed their size in place of which new ones stand: hosts keep memory of a map's
    first size with it."""
    for name, module in [
        (n, m) for n, m in transformer.named_modules() if isinstance(m, FoldedMap)
    ]:
        new = type(module)(module.in_features, module.out_features, device="meta")
        new.weight, new.bias, new.inputs = module.weight, module.bias, module.inputs
        if isinstance(module, TableMap):
            new.batches = module.batches
        transformer.set_submodule(name, new.train(module.training))


def cut(whole: FoldedMap, folding: Folding) -> FoldedMap:
    """A folded map that gives the first half of its outputs."""
    options = {"dtype": whole.weight.dtype, "device": whole.weight.device}
    return folded_map(
        half_of(type(whole)), folding, whole.out_features // 2, whole.inputs[0], options
    )


def attach(embedder: nn.Module, final: nn.Module, inputs: Basis | Table) -> None:
    """The host's time embedder appends what the blocks need; its final layer does not see it."""
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
