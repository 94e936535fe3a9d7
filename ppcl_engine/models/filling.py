"""Empty modules filled from files; a tensor that is missing, of the wrong shape or not of numbers
is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..system.json_text import shown


def fill(
    module: nn.Module,
    read: Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    device: str,
    where: Path | str,
) -> nn.Module:
    """The module (on any device, also meta) with `read(name)` as each of its tensors; eval, no
    gradients.

    Raises ValueError naming `where` and a tensor of the wrong shape.
    """
    state = {}
    for name, empty in module.state_dict().items():
        tensor = read(name)
        check_shape(name, tensor.shape, empty.shape, where)
        state[name] = tensor.to(device, dtype)
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def check_shape(
    name: str, shape: tuple[int, ...], expected: tuple[int, ...], where: Path | str
) -> None:
    if tuple(shape) != tuple(expected):
        raise ValueError(
            f"{where}: {shown(name)} has shape {tuple(shape)}, not {tuple(expected)}; is this the right file?"
        )
