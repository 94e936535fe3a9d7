"""What stands inside a pruned block of the host: the block's own forward then runs on these parts.

The same edits as the engine's (`ppcl_engine.architectures.qwen_image`), made with the host's operations, so that its
precision, offloading and LoRA reach them. They go into a block for good (a file that holds one variant), or into a view
of it that lasts one call (a model whose variants can be switched).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ...ppcl_engine.architectures import projections
from ...ppcl_engine.layout import Place
from ...ppcl_engine.surgery import Correction as EngineCorrection

STREAMS = {"image": "img", "text": "txt"}
RETURNS = ("text", "image")
OWN_PARTS = ("student", "projections")  # what a block of a switchable model holds besides the host's

Linear = Callable[..., nn.Module]
"""(width in, width out, bias=True) -> one of the host's linear maps"""
Maps = Callable[[str, str], nn.Module]
"""(site kind, part of its projection) -> the linear map"""


class Texts(dict):
    """Index of a text group's source -> the modulated text that it left in this forward. Emptied before every forward."""


class Correction(EngineCorrection):
    """The engine's, on maps of the host."""

    def __init__(self, maps: dict[str, nn.Module]):
        nn.Module.__init__(self)
        self.maps = nn.ModuleDict(maps)

    @classmethod
    def empty(cls, width: int, streams: tuple[str, ...], rank: int | None, linear: Linear) -> Correction:
        return cls({stream: _correction_map(width, rank, linear) for stream in streams})

    def without(self, stream: str) -> Correction:
        return Correction({name: part for name, part in self.maps.items() if name != stream})


def _correction_map(width: int, rank: int | None, linear: Linear) -> nn.Module:
    if rank is None:
        return linear(width, width)
    return nn.Sequential(linear(width, rank, bias=False), linear(rank, width))


class PaddedModulation(nn.Sequential):
    """The engine's; of a modulation that was not cut it takes the first half."""

    def __init__(self, width: int, *parts: nn.Module):
        super().__init__(*parts)
        self.width = width

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        first = super().forward(conditioning)[..., : 3 * self.width]
        zeros = torch.zeros_like(first[..., : self.width])
        return torch.cat([first, zeros, zeros, zeros + 1], dim=-1)


class FixedModulation(projections.FixedModulation):
    """The engine's; it remembers the conditioning of the block that runs, for `ProjectedText`."""

    conditioning: torch.Tensor | None = None

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        self.conditioning = conditioning
        return super().forward(conditioning)


class ProjectedText(nn.Module):
    """txt_modulated_j = P_j(txt_modulated_a) + txt_modulated_a, a being the last full block before the group.

    Where a did not run (another node skipped it), the text that comes in is what would have entered a: it is modulated
    here as a would have done.
    """

    def __init__(self, projection: nn.Module, texts: Texts, index: int, source: nn.Module, modulation: FixedModulation):
        super().__init__()
        self.projection, self.texts, self.index = projection, texts, index
        self.beside = (source, modulation)  # in a tuple: they are not parts of this module

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        modulated = self.texts.get(self.index)
        if modulated is None:
            source, modulation = self.beside
            modulated = modulated_text(source, text, modulation.conditioning)
        return self.projection(modulated) + modulated


def modulated_text(block: nn.Module, text: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
    """What a block's joint attention reads of the text."""
    shift, scale = block.txt_mod(conditioning).split(text.shape[-1], dim=-1)[:2]
    return torch.addcmul(shift.unsqueeze(1), block.txt_norm1(text), 1 + scale.unsqueeze(1))


def project(block: nn.Module, place: Place, maps: Maps, texts: Texts, source: nn.Module | None) -> nn.Module:
    """Puts a place's projections into the block, which is changed. `source`: the block that its text reads from."""
    for site in place.ffn:
        short = STREAMS[site.kind.removeprefix("ffn_")]
        setattr(block, f"{short}_mlp", maps(site.kind, "map"))
        if site.form == "paper":
            setattr(block, f"{short}_mod", PaddedModulation(block.dim, *getattr(block, f"{short}_mod")))
            setattr(block, f"{short}_norm2", nn.Identity())
    if place.text_source is not None:
        _project_text(block, place, maps, texts, source)
    if place.publishes:
        block.attn.add_q_proj.register_forward_pre_hook(partial(_keep, texts, place.index))
    return block


def _project_text(block: nn.Module, place: Place, maps: Maps, texts: Texts, source: nn.Module) -> None:
    """No modulation, norm or MLP of the text is left; the q, k, v maps of the text stay."""
    block.txt_mod = FixedModulation(block.attn.add_q_proj.in_features, place.steps_text)
    block.txt_norm1 = ProjectedText(maps("text", "map"), texts, place.text_source, source, block.txt_mod)
    block.txt_norm2 = nn.Identity()
    block.txt_mlp = maps("text", "step") if place.steps_text else projections.Nothing()
    block.attn.to_add_out = nn.Identity()
    if hasattr(block, "correction"):
        block.correction = block.correction.without("text")  # the group moves the text on, no block inside it


def _keep(texts: Texts, index: int, module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
    texts[index] = arguments[0]


def view_of_block(block: nn.Module) -> nn.Module:
    """A block on the same parts: what is put into the view does not reach the block. Nothing is copied."""
    view = _view(block)
    view.__dict__.pop("forward", None)  # a patch of the block's forward is what brought us here
    for name in OWN_PARTS:
        view._modules.pop(name, None)
    view.attn = _view(block.attn)
    view.attn.add_q_proj = _view(block.attn.add_q_proj)
    return view


def _view(module: nn.Module) -> nn.Module:
    view = copy.copy(module)
    view.__dict__["_modules"] = dict(module._modules)
    view.__dict__["_forward_pre_hooks"] = module._forward_pre_hooks.copy()
    return view
