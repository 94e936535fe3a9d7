"""Blocks made linear."""

import torch


def set_gates(mod: torch.nn.Module, attention: float, mlp: float) -> None:
    """Constant modulation: no shift, no scale, these gates."""
    width = mod[1].out_features // 6
    mod[1].weight.zero_(), mod[1].bias.zero_()
    mod[1].bias[2 * width : 3 * width] = attention
    mod[1].bias[5 * width :] = mlp


def make_linear(block: torch.nn.Module) -> None:
    """No attention; the MLP's inputs lie so far right that GELU is the identity there."""
    for mod, mlp in ((block.img_mod, block.img_mlp), (block.txt_mod, block.txt_mlp)):
        set_gates(mod, 0.0, 0.7)
        mlp.net[0].proj.bias.fill_(8.0)
        mlp.net[2].bias.copy_(-mlp.net[2].weight @ mlp.net[0].proj.bias)
