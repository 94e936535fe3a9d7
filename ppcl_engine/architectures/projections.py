"""The small modules inside a width-pruned block, so that the block's own forward runs on them.

The mathematics of the method's width stage (paper, section 3.4) is here once, for training, export
and inference; the architecture knows which sub-module of a block each of them replaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from .modules import AnyModule

OPEN = 16.0  # 1 - tanh(16) is 2.5e-14, far below float32's last bit


class SharedText:
    """Carries a text group's modulated text from the group's source block to its projections,
    during one forward.

    The source writes it in every forward before the group's blocks read it; it holds no weights.
    """

    value: torch.Tensor | None = None


class PaddedModulation(nn.Sequential):
    """A modulation cut to its first half (3 d: attention's shift, scale, gate), as the paper's FFN
    form needs.

    The second half reads shift 0, scale 0, gate 1, so that the block adds P(x) to the stream x
    itself. Keeps the names of the modulation's own tensors.
    """

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        return padded(super().forward(conditioning))


class PaddedLinear(nn.Linear):
    """The same for a block that keeps only the modulation's linear map."""

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        return padded(super().forward(conditioning))


def padded(first: torch.Tensor) -> torch.Tensor:
    """[..., 3 d] -> [..., 6 d], the second half shift 0, scale 0, gate 1"""
    zeros = torch.zeros_like(first[..., : first.shape[-1] // 3])
    return torch.cat([first, zeros, zeros, zeros + 1], dim=-1)


class PaddedDual(nn.Linear):
    """The modulation of a block that attends to the image twice, without the FFN's third in the
    middle (9 d -> 6 d)."""

    @staticmethod
    def kept(whole: torch.Tensor) -> torch.Tensor:
        """The rows that are kept of the whole modulation's weight or bias."""
        first, _, second = whole.chunk(3)
        return torch.cat([first, second])

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        first, second = super().forward(conditioning).chunk(2, dim=-1)
        return torch.cat([padded(first), second], dim=-1)


class FixedModulation(nn.Module):
    """Replaces a text modulation whose stream does not move: all zeros, or 1 as the FFN's gate
    where it steps."""

    def __init__(self, width: int, steps: bool):
        super().__init__()
        self.width, self.steps = width, steps

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        zeros = conditioning.new_zeros(*conditioning.shape[:-1], 5 * self.width)
        gate = conditioning.new_full((*conditioning.shape[:-1], self.width), float(self.steps))
        return torch.cat([zeros, gate], dim=-1)


class ProjectedText(nn.Module):
    """txt_modulated_j = P_j(txt_modulated_a) + txt_modulated_a, where a is the last full block
    before the group."""

    def __init__(self, projection: nn.Linear, source: SharedText):
        super().__init__()
        self.projection, self.source = projection, source

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        modulated = self.source.value
        assert modulated is not None, "the block before a text group has to run before the group"
        return self.projection(modulated) + modulated


class ProjectedNorm(nn.Module):
    """`ProjectedText` where norm and modulation are one module.

    So it also returns attention's gate and the FFN's shift, scale and gate: all zeros, except that
    the FFN's gate is 1 where the group steps the text.
    """

    def __init__(self, projection: nn.Linear, source: SharedText, steps: bool):
        super().__init__()
        self.projection, self.source, self.steps = projection, source, steps

    def forward(self, _: torch.Tensor, emb: torch.Tensor) -> tuple[torch.Tensor, ...]:
        modulated = self.source.value
        assert modulated is not None, "the block before a text group has to run before the group"
        zeros = torch.zeros_like(modulated[:, 0])
        return (
            self.projection(modulated) + modulated,
            zeros,
            zeros,
            zeros,
            zeros + float(self.steps),
        )


class ProjectedLastNorm(ProjectedNorm):
    """The same for the last block, which only modulates its text."""

    def forward(self, text: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        return super().forward(text, emb)[0]


class OpenGate(nn.Sequential):
    """A modulation by (scale, gate) of attention and of the FFN, cut to attention's half (2 d), as
    the paper's FFN form needs where gates pass a tanh.

    The second half reads scale 0 and a gate whose tanh is 1 in every precision. Keeps the names of
    the modulation's own tensors.
    """

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        return opened(super().forward(conditioning))


def opened(first: torch.Tensor) -> torch.Tensor:
    """[..., 2 d] -> [..., 4 d], the second half scale 0, gate `OPEN`"""
    zeros = torch.zeros_like(first[..., : first.shape[-1] // 2])
    return torch.cat([first, zeros, zeros + OPEN], dim=-1)


class AddedProjection(nn.Linear):
    """[attention, P(x)] -> W attention + b + P(x): what is left of a map that joined attention and
    FFN."""

    def forward(self, joined: torch.Tensor) -> torch.Tensor:
        attention, projected = joined.chunk(2, dim=-1)
        return super().forward(attention) + projected


class Nothing(nn.Module):
    """Zeros in the shape of its input, for an output that a gate of zero drops anyway."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


def linear_like(
    like: nn.Linear, width_in: int, width_out: int, kind: type[nn.Linear] = nn.Linear
) -> nn.Linear:
    """A new linear map on the device and in the precision of `like`; zero, so that P(x) + x starts
    as x."""
    new = kind(width_in, width_out, device=like.weight.device, dtype=like.weight.dtype)
    nn.init.zeros_(new.weight)
    nn.init.zeros_(new.bias)
    return new.requires_grad_(like.weight.requires_grad)


def cut_linear(
    linear: nn.Linear, width_in: int, width_out: int, kind: type[nn.Linear] = nn.Linear
) -> nn.Linear:
    """A copy of the first rows and columns."""
    cut = linear_like(linear, width_in, width_out, kind)
    with torch.no_grad():
        cut.weight.copy_(linear.weight[:width_out, :width_in])
        cut.bias.copy_(linear.bias[:width_out])
    return cut


def without_ffn(modulation: nn.Linear) -> nn.Linear:
    """A copy of a modulation without the rows that give the FFN's shift, scale and gate."""
    width = modulation.in_features
    if modulation.out_features == 6 * width:
        return cut_linear(modulation, width, 3 * width, PaddedLinear)
    cut: AnyModule = linear_like(modulation, width, 6 * width, PaddedDual)
    with torch.no_grad():
        for name, tensor in cut.named_parameters():
            tensor.copy_(cut.kept(getattr(modulation, name)))
    return cut


def left_of(whole: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """What a cut map of this shape keeps of a weight or bias of the whole one."""
    if 3 * shape[0] == 2 * whole.shape[0]:
        return PaddedDual.kept(whole)
    return whole[tuple(slice(size) for size in shape)]


def spread_out(cut: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse: in the size of the whole, zero where nothing is left."""
    whole = torch.zeros(shape, dtype=cut.dtype)
    if 3 * cut.shape[0] == 2 * shape[0]:
        first, _, last = whole.chunk(3)
        for part, kept in zip((first, last), cut.chunk(2), strict=True):
            part.copy_(kept)
    else:
        left_of(whole, tuple(cut.shape)).copy_(cut)
    return whole


def publish(block: AnyModule, text_map: AnyModule, source: SharedText) -> None:
    """Keeps what enters `text_map`, a block's first map of the modulated text, for the group behind
    the block."""

    def keep(module: AnyModule, arguments: tuple[torch.Tensor, ...]) -> None:
        source.value = arguments[0]

    block.shared_text = source
    text_map.register_forward_pre_hook(keep)


@contextmanager
def watched(
    block: AnyModule, inputs: Mapping[str, str], outputs: Mapping[str, str], returns: Sequence[str]
) -> Iterator[dict[str, torch.Tensor]]:
    """What parts of a block read and return while it runs, under names of our choice (sub-module ->
    name).

    `returns`: names for what the block returns, before a correction; one name where it returns one
    tensor. A part that returns several tensors is seen as the tuple.
    """
    seen: dict[str, torch.Tensor] = {}

    def ends(module: AnyModule, arguments, results) -> None:
        results = (results,) if isinstance(results, torch.Tensor) else results
        seen.update(zip(returns, results, strict=True))

    handles = [block.register_forward_hook(ends, prepend=True)]
    for part, name in inputs.items():
        hook = lambda module, arguments, name=name: seen.__setitem__(name, arguments[0])  # noqa: E731
        handles.append(block.get_submodule(part).register_forward_pre_hook(hook))
    for part, name in outputs.items():
        hook = lambda module, arguments, result, name=name: seen.__setitem__(name, result)  # noqa: E731
        handles.append(block.get_submodule(part).register_forward_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
