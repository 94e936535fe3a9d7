"""2:4 weights on PyTorch's kernels for them, where the GPU supports these; elsewhere such weights
run as dense ones."""

from __future__ import annotations

import torch
from torch import nn

CAPABILITY = (8, 0)  # Ampere and later
ROWS, COLUMNS = 32, 64  # the largest multiples that a backend asks for in 16 bits


def on_kernels(model: nn.Module) -> int:
    """Moves every 2:4 weight of a model for inference to the kernels; returns how many.

    Only in 16 bits, on a GPU that supports them; other weights stay as they are. Such a weight
    takes 9/16 of the memory and can be neither trained nor patched.
    """
    modules = [m for m in model.modules() if isinstance(m, nn.Linear) and _fits(m.weight)]
    for module in modules:
        weight = torch.sparse.to_sparse_semi_structured(module.weight.detach().contiguous())
        module.weight = nn.Parameter(weight, requires_grad=False)
    return len(modules)


def _fits(weight: torch.Tensor) -> bool:
    if not weight.is_cuda or weight.dtype not in (torch.float16, torch.bfloat16):
        return False
    if torch.cuda.get_device_capability(weight.device) < CAPABILITY:
        return False
    return weight.shape[0] % ROWS == 0 and weight.shape[1] % COLUMNS == 0 and is_two_of_four(weight)


def is_two_of_four(weight: torch.Tensor) -> bool:
    """Also true for a dense matrix of which half happens to be zero in this way."""
    return weight.shape[1] % 4 == 0 and int((weight != 0).reshape(-1, 4).sum(1).max()) <= 2
