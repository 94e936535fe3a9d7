"""One linear layer with inputs, as pruning sees it."""

import torch


def layer(
    rows: int = 3, columns: int = 4, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(W, inputs, their Gram matrix), correlated as a model's are"""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    factors = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    mixing = torch.randn(3, columns, generator=generator, dtype=torch.float64)
    inputs = factors @ mixing + 0.7 * torch.randn(
        200, columns, generator=generator, dtype=torch.float64
    )
    return weight, inputs, inputs.T @ inputs / len(inputs)
