"""LoRA on a pruned model: what a file says of the teacher's block u goes to the student that stands for it.

Block numbers need no translation (a pruned model keeps the teacher's), and so ControlNet residuals and patches of
blocks land right by themselves. Two things are left: in a switchable model a student is beside the teacher's block,
and a modulation that was cut to its first half takes the first half of a LoRA's change.
"""

from __future__ import annotations

import re

import comfy.lora
import torch
from comfy.patcher_extension import WrappersMP
from comfy.weight_adapter import WeightAdapterBase

from .blocks import PaddedModulation

WRAPPER = "ppcl"
OF_BLOCK = re.compile(r"(diffusion_model\.transformer_blocks\.\d+\.)(?!student\.|projections\.)(.+)")


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
    shapes = {f"diffusion_model.{name}": p.shape for name, p in transformer.named_parameters()}
    cut = {f"{name}.1.{leaf}" for name in _cut_modulations(model.model) for leaf in ("weight", "bias")}
    for key, patches in list(model.patches.items()):
        match = OF_BLOCK.match(key)
        if match and (mirrored := f"{match[1]}student.{match[2]}") in shapes:
            model.patches[mirrored] = list(patches)
        if key in cut:
            model.patches[key] = [_of_first_rows(patch) for patch in patches]


def _cut_modulations(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PaddedModulation)]


def _of_first_rows(patch: tuple) -> tuple:
    strength, value, strength_model, offset, function = patch
    if isinstance(value, FirstRows) or offset is not None:
        return patch
    return strength, FirstRows(value), strength_model, offset, function


class FirstRows(WeightAdapterBase):
    """The change of a tensor of twice as many rows, of which the first half is left."""

    name = "ppcl_first_rows"

    def __init__(self, inner):
        self.inner, self.weights = inner, getattr(inner, "weights", ())
        self.loaded_keys = getattr(inner, "loaded_keys", set())

    def calculate_weight(self, weight, key, strength, strength_model, offset, function,
                         intermediate_dtype=torch.float32, original_weight=None):  # fmt: skip
        whole = torch.cat([weight, torch.zeros_like(weight)])
        patch = (strength, self.inner, 1.0, None, function)
        return comfy.lora.calculate_weight([patch], whole, key, intermediate_dtype)[: len(weight)]
