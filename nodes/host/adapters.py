"""LoRA on a pruned model: what a file says of the teacher's block u goes to the student that stands for it.

Block numbers need no translation (a pruned model keeps the teacher's), and so ControlNet residuals and patches of
blocks land right by themselves. Two things are left: in a switchable model a student is beside the teacher's block,
and a linear map that was cut takes its part of a change.
"""

from __future__ import annotations

import re
from functools import cache, partial

import comfy.float
import torch
from comfy.model_patcher import LowVramPatch
from comfy.patcher_extension import WrappersMP
from torch import nn

from .base import HALF, Cut, Host

WRAPPER = "ppcl"


def prepare(model) -> None:
    """Makes the host's patcher translate before its weights are loaded for sampling, and every clone of it too."""
    model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, WRAPPER, _before_sampling)


def _before_sampling(executor, model, *arguments, **named):
    translate_patches(model)
    return executor(model, *arguments, **named)


def translate_patches(model) -> None:
    """Of weights, in place; again changes nothing. Depends on the patches alone, so branches with the same patches
    stay alike for the host."""
    transformer = model.model.diffusion_model
    if not hasattr(transformer, "ppcl"):
        return
    names = {f"diffusion_model.{name}" for name, _ in transformer.named_parameters()}
    of_block = _of_block(transformer.ppcl.structure.host)
    for found in (model.patches, *model.hook_patches.values()):  # hooks: LoRA on a part of the conditioning or schedule
        for key, patches in list(found.items()):
            match = of_block.match(key)
            if match and (mirrored := f"{match[1]}student.{match[2]}") in names:
                found[mirrored] = list(patches)


def _of_block(host: Host) -> re.Pattern:
    lists = "|".join(blocks.name for blocks in host.lists)
    return re.compile(rf"(diffusion_model\.(?:{lists})\.\d+\.)(?!student\.|projections\.)(.+)")


class InAnotherForm:
    """Before one of the host's linear maps: patches know its tensors in a form that is not the stored one."""

    def shown(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What patches see of a stored tensor ("weight", "bias")."""
        return tensor

    def kept(self, name: str, tensor: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
        """What is stored in its place, of what they made of it."""
        return changed

    def forward(self, *arguments, **named):
        see_in_form(self)
        return super().forward(*arguments, **named)

    def convert_weight(self, weight, inplace=False, **named):
        return self.shown("weight", getattr(super(), "convert_weight", _same)(weight, inplace=inplace, **named))

    def convert_bias(self, bias, inplace=False, **named):
        return self.shown("bias", bias)

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **named):
        store = getattr(super(), "set_weight", None) or partial(stored, self, "weight")
        tensor = self.kept("weight", self.weight, weight)
        return store(tensor, inplace_update=inplace_update, seed=seed, return_weight=return_weight)

    def set_bias(self, bias, inplace_update=False, seed=None, return_weight=False, **named):
        return stored(self, "bias", self.kept("bias", self.bias, bias), inplace_update, seed, return_weight)


class PatchInForm(LowVramPatch):
    """The host's change of a tensor on its way to the device. target: (a map in another form, "weight" or "bias")"""

    target: tuple[InAnotherForm, str]

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        module, name = self.target
        return module.kept(name, tensor, super().__call__(module.shown(name, tensor)))


def see_in_form(module: InAnotherForm) -> None:
    """Newer hosts ask a map for the form that patches know where they change it for good, and no longer where they change
    it on its way to the device. The host has set these patches since the last forward, and holds on to them."""
    if _asked_on_the_way():
        return
    for name in ("weight", "bias"):
        lazy = getattr(module, f"{name}_lowvram_function", None)
        for patch in (*getattr(module, f"{name}_function"), lazy):
            if type(patch) is LowVramPatch:
                patch.__class__, patch.target = PatchInForm, (module, name)


@cache
def _asked_on_the_way() -> bool:
    asked = []
    LowVramPatch("", {"": []}, lambda tensor, **_: asked.append(True) or tensor)(torch.zeros(1))
    return bool(asked)


def half_of(linear: type[nn.Module]) -> type[nn.Module]:
    return part_of(linear, HALF)


def part_of(linear: type[nn.Module], cut: Cut) -> type[nn.Module]:
    """The host's linear map, cut. Patches see it whole."""

    class PartOf(*((linear,) if issubclass(linear, InAnotherForm) else (InAnotherForm, linear))):
        def shown(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
            return cut.whole(super().shown(name, tensor))

        def kept(self, name: str, tensor: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
            return super().kept(name, tensor, cut.of(changed))

    return PartOf


def _same(weight: torch.Tensor, **_) -> torch.Tensor:
    return weight


def stored(module: nn.Module, name: str, tensor: torch.Tensor, inplace_update=False, seed=None, return_weight=False):
    old = getattr(module, name)
    tensor = comfy.float.stochastic_rounding(tensor, old.dtype, seed=seed)
    if return_weight:
        return tensor
    if inplace_update:
        return old.data.copy_(tensor)
    setattr(module, name, nn.Parameter(tensor, requires_grad=False))
