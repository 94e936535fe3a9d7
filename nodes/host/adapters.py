"""LoRA on a pruned model: what a file changes in the teacher's block u also changes the student that
stands for it.

ControlNet residuals and patches of blocks need nothing here: skipped_blocks.py keeps every block at the
teacher's number. Two things remain to be done: in a switchable model a student sits
beside the teacher's block, and a linear map that was cut takes only its part of a change.
"""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Callable
from functools import partial

import comfy.float
import torch
from comfy.model_patcher import LowVramPatch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import nn

from .base import HALF, Cut, Host

WRAPPER = "ppcl"


def prepare(model) -> None:
    """Makes the host's patcher, and every clone of it, translate its patches before weights are
    loaded for sampling. After any other loading (by a node that saves the model) the patches are
    translated and the weights loaded once more."""
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, WRAPPER, _before_sampling)
    model.add_callback_with_key(CallbacksMP.ON_LOAD, WRAPPER, _after_load)


def _before_sampling(executor, model, *arguments, **named):
    translate_patches(model)
    return executor(model, *arguments, **named)


def _after_load(model, device, memory: float, force: bool, whole: bool, *_, **__) -> None:
    """Called by the host with the arguments of the load that has just ended."""
    if not translate_patches(model) or _patches_late(model):
        return
    used = model.model.model_loaded_weight_memory
    # a new id makes the host take the old patches out before it applies these
    model.model.current_weight_patches_uuid = uuid.uuid4()
    model.partially_load(device, math.inf if whole else memory - used, force_patch_weights=force)


def _patches_late(model) -> bool:
    """Whether the host patches a weight each time it is used (dynamic VRAM)."""
    return hasattr(model, "is_dynamic") and model.is_dynamic()


def translate_patches(model) -> bool:
    """Copies patches of the teacher's weights to its students', in place. Returns whether a weight
    got a new patch: a second call changes nothing.

    The result depends on the patches alone, so branches with the same patches stay alike for the
    host.
    """
    transformer, new = model.model.diffusion_model, False
    if not hasattr(transformer, "ppcl"):
        return new
    names = {f"diffusion_model.{name}" for name, _ in transformer.named_parameters()}
    of_block = _of_block(transformer.ppcl.structure.host)
    # hooks: LoRA on a part of the conditioning or schedule
    for by_key in (model.patches, *model.hook_patches.values()):
        for key, patches in list(by_key.items()):
            match = of_block.match(key)
            if match and (student := f"{match[1]}student.{match[2]}") in names:
                own = by_key.get(student, [])
                by_key[student] = _of_student(patches, own)
                new |= by_key is model.patches and not _alike(by_key[student], own)
    return new


def _of_student(patches: list[tuple], own: list[tuple]) -> list[tuple]:
    """The patches of a student's weight, from those of the teacher's (`patches`) and its own so far.

    The patch of a merge holds a list: the other model's weight, and what changes that one. A student
    keeps its own weight of the other model and takes over the teacher's changes.
    """
    merges = iter([patch for patch in own if isinstance(patch[1], list)])
    translated = []
    for patch in patches:
        if not isinstance(patch[1], list):
            translated.append(patch)
        elif merge := next(merges, None):
            translated.append((patch[0], [merge[1][0], *patch[1][1:]], *patch[2:]))
    return translated


def _alike(patches: list[tuple], others: list[tuple]) -> bool:
    """Whether two lists hold the same patches, those inside merges included. Identity is enough:
    the host never changes a patch."""
    if len(patches) != len(others):
        return False
    pairs = zip(patches, others, strict=True)
    return all(
        a is b or (isinstance(a[1], list) and isinstance(b[1], list) and _alike(a[1], b[1]))
        for a, b in pairs
    )


def _of_block(host: Host) -> re.Pattern:
    """Matches the name of a teacher's weight in a block: (up to the block, the rest)."""
    lists = "|".join(blocks.name for blocks in host.lists)
    return re.compile(rf"(diffusion_model\.(?:{lists})\.\d+\.)(?!student\.|projections\.)(.+)")


ON_THE_WAY = (
    "weight_function",
    "bias_function",
    "weight_lowvram_function",
    "bias_lowvram_function",
)
"""attributes of the host's modules that hold changes to be made while a weight is moved to the
device"""


class PatchedWhole:
    """Mixin for a linear map that stores less than the full model's weight, but whose patches are
    made for that full weight.

    Where the host patches a stored weight, it calls `convert_weight` before and `set_weight` after.
    Newer hosts do not when they patch a weight on its way to the device; such a change is wrapped in
    an `OnWhole` when the host sets it.
    """

    def whole(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """The full model's "weight" or "bias", as far as it is known from what is stored."""
        return stored

    def left(self, name: str, whole: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        """What to store of the full model's changed "weight" or "bias"."""
        return whole

    def forward(self, *arguments, **named):
        for name in ("weight", "bias"):
            # appending to a list does not pass through __setattr__
            changes = getattr(self, f"{name}_function")
            changes[:] = [
                OnWhole(self, name, c) if isinstance(c, LowVramPatch) else c for c in changes
            ]
        return super().forward(*arguments, **named)

    def convert_weight(self, weight, inplace=False, **named):
        return self.whole(
            "weight", getattr(super(), "convert_weight", _same)(weight, inplace=inplace, **named)
        )

    def convert_bias(self, bias, inplace=False, **named):
        return self.whole("bias", bias)

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **named):
        store = getattr(super(), "set_weight", None) or partial(stored, self, "weight")
        tensor = self.left("weight", weight, self.weight)
        return store(tensor, inplace_update=inplace_update, seed=seed, return_weight=return_weight)

    def set_bias(self, bias, inplace_update=False, seed=None, return_weight=False, **named):
        return stored(
            self, "bias", self.left("bias", bias, self.bias), inplace_update, seed, return_weight
        )

    def __setattr__(self, name, value):
        if name in ON_THE_WAY and value is not None:
            leaf = name.partition("_")[0]
            value = (
                [OnWhole(self, leaf, c) for c in value]
                if isinstance(value, list)
                else OnWhole(self, leaf, value)
            )
        super().__setattr__(name, value)


class OnWhole:
    """Wraps a change that the host makes on the way to the device: it is made on the full weight."""

    def __init__(
        self, module: PatchedWhole, name: str, change: Callable[[torch.Tensor], torch.Tensor]
    ):
        # some hosts make the change itself convert and store: that would be done twice
        for asked in ("convert_func", "set_func"):
            if getattr(change, asked, None) is not None:
                setattr(change, asked, None)
        self.module, self.name, self.change = module, name, change

    def __call__(self, stored: torch.Tensor) -> torch.Tensor:
        whole = self.change(self.module.whole(self.name, stored))
        return self.module.left(self.name, whole, stored)

    def __getattr__(self, name: str):
        """Whatever else the host asks of its change, such as its memory or stream."""
        return getattr(self.change, name)


def half_of(linear: type[nn.Module]) -> type[nn.Module]:
    return part_of(linear, HALF)


def part_of(linear: type[nn.Module], cut: Cut) -> type[nn.Module]:
    """A subclass of the host's linear map that stores only a cut; patches see the whole."""

    class PartOf(*((linear,) if issubclass(linear, PatchedWhole) else (PatchedWhole, linear))):
        def whole(self, name: str, stored: torch.Tensor) -> torch.Tensor:
            return cut.whole(super().whole(name, stored))

        def left(self, name: str, whole: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
            return super().left(name, cut.of(whole), stored)

    return PartOf


def _same(weight: torch.Tensor, **_) -> torch.Tensor:
    return weight


def stored(
    module: nn.Module,
    name: str,
    tensor: torch.Tensor,
    inplace_update=False,
    seed=None,
    return_weight=False,
):
    """Stores a changed tensor as the host's own `set_weight` does, with the arguments of that."""
    old = getattr(module, name)
    tensor = comfy.float.stochastic_rounding(tensor, old.dtype, seed=seed)
    if return_weight:
        return tensor
    if inplace_update:
        return old.data.copy_(tensor)
    setattr(module, name, nn.Parameter(tensor, requires_grad=False))
