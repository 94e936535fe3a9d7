"""The modules that stand inside a pruned block of the host; the block's own forward runs on them.

The edits are the engine's, made with the host's operations, so that its precision, offloading and
LoRA reach them. They are put into the block itself (in a file that holds one variant), or into a
view of it that lasts one call (in a model whose variants can be switched).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import comfy.ops
import torch
import torch.nn.functional as F
from torch import nn

from ...ppcl_engine.architectures import projections
from ...ppcl_engine.models.layout import Place
from ...ppcl_engine.models.surgery import Correction as EngineCorrection
from .adapters import PatchedWhole
from .base import Host, Maps

# what a block of a switchable model holds besides the host's
OWN_PARTS = ("student", "projections")

Linear = Callable[..., nn.Module]
"""(width in, width out, bias=True) -> one of the host's linear maps"""


class Texts(dict):
    """Index of a text group's source -> the modulated text that it left in this forward. Emptied
    before every forward."""

    tokens: int = 0
    """number of text tokens in this forward, where blocks read text and image as one sequence"""


class Correction(EngineCorrection):
    """The engine's, on maps of the host."""

    def __init__(self, maps: dict[str, nn.Module]):
        nn.Module.__init__(self)
        self.maps = nn.ModuleDict(maps)

    @classmethod
    def empty(
        cls, width: int, streams: tuple[str, ...], rank: int | None, linear: Linear
    ) -> Correction:
        return cls({stream: _correction_map(width, rank, linear) for stream in streams})

    def without(self, stream: str) -> Correction:
        return Correction({name: part for name, part in self.maps.items() if name != stream})


def _correction_map(width: int, rank: int | None, linear: Linear) -> nn.Module:
    if rank is None:
        return linear(width, width)
    return nn.Sequential(linear(width, rank, bias=False), linear(rank, width))


def add_correction(
    block: nn.Module, correction: Correction, gives: tuple[str, ...], texts: Texts
) -> nn.Module:
    """Makes the block add the correction to what it returns, as the engine does. Where text and image
    are one sequence, each is corrected by itself."""
    block.correction = correction
    block.register_forward_hook(partial(_correct, gives, texts))
    return block


def _correct(gives: tuple[str, ...], texts: Texts, module: nn.Module, arguments, outputs):
    correct = module.correction.correct
    if gives == ("joint",):
        text, image = outputs[:, : texts.tokens], outputs[:, texts.tokens :]
        return torch.cat([correct("text", text), correct("image", image)], dim=1)
    return tuple(correct(stream, x) for stream, x in zip(gives, outputs, strict=True))


class FixedModulation(projections.FixedModulation):
    """The engine's; it also remembers the conditioning of the block that runs, for
    `ProjectedText`."""

    conditioning: torch.Tensor | None = None

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        self.conditioning = conditioning
        return super().forward(conditioning)


class ProjectedText(nn.Module):
    """txt_modulated_j = P_j(txt_modulated_a) + txt_modulated_a, where a is the last full block
    before the group.

    If a did not run because another node skipped it, the text that arrives here is what would have
    entered a, and `modulate` modulates it as a would have. It has to be a partial function: unlike a
    closure, that is copied along with the model.
    """

    def __init__(
        self,
        projection: nn.Module,
        texts: Texts,
        index: int,
        modulate: Callable[[torch.Tensor], torch.Tensor],
    ):
        super().__init__()
        self.projection, self.texts, self.index, self.modulate = projection, texts, index, modulate

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        modulated = self.texts.get(self.index)
        if modulated is None:
            modulated = self.modulate(text)
        return self.projection(modulated) + modulated


def project(
    host: Host, block: nn.Module, place: Place, maps: Maps, texts: Texts, source: nn.Module | None
) -> nn.Module:
    """Changes the block: puts a place's projections into it. `source`: the block that its text reads
    from."""
    for site in place.ffn:
        host.project_ffn(block, site.kind, site.form, maps(site.kind, "map"))
    if place.text_source is not None:
        host.project_text(block, place, maps, texts, source)
        if hasattr(block, "correction"):
            # only the end of a text group moves the text on
            block.correction = block.correction.without("text")
    if place.publishes:
        block.get_submodule(host.text_map).register_forward_pre_hook(
            partial(_keep, texts, place.index)
        )
    return block


def _keep(texts: Texts, index: int, module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
    texts[index] = arguments[0]


def view_of_block(host: Host, block: nn.Module) -> nn.Module:
    """A block that shares the modules of this one, without copying weights: what is put into the
    view does not reach the block."""
    view = _view(block)
    view.__dict__.pop(
        "forward", None
    )  # the patched forward, which led here: calling it again would not end
    for name in OWN_PARTS:
        view._modules.pop(name, None)
    for name in host.viewed:
        parent, _, child = name.rpartition(".")
        owner = view.get_submodule(parent) if hasattr(view, name.split(".")[0]) else None
        if owner is not None:
            setattr(owner, child, _view(getattr(owner, child)))
    return view


def _view(module: nn.Module) -> nn.Module:
    view = copy.copy(module)
    view.__dict__["_modules"] = dict(module._modules)
    view.__dict__["_forward_pre_hooks"] = module._forward_pre_hooks.copy()
    return view


def run_part(linear: nn.Module, x: torch.Tensor, width_out: int, width_in: int) -> torch.Tensor:
    """The first `width_out` outputs of a linear map for its first inputs x [..., width_in]. Where the
    weight is not a plain tensor (scaled, quantised, another pack's), the whole map runs on padded
    inputs, and the rest of its outputs is cut off."""
    own = comfy.ops.disable_weight_init.Linear.forward_comfy_cast_weights
    if type(linear).forward_comfy_cast_weights is own and not isinstance(linear, PatchedWhole):
        weight, bias, stream = comfy.ops.cast_bias_weight(linear, x, offloadable=True)
        outputs = F.linear(
            x, weight[:width_out, :width_in], None if bias is None else bias[:width_out]
        )
        comfy.ops.uncast_bias_weight(linear, weight, bias, stream)
        return outputs
    return type(linear).forward(linear, F.pad(x, (0, linear.in_features - width_in)))[
        ..., :width_out
    ]
