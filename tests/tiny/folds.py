"""What tests of folding compare."""

from __future__ import annotations

import torch

from ppcl_engine.system.tensor_files import TensorFile


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def tensors_of(path) -> dict[str, torch.Tensor]:
    return TensorFile(path).read_all()


def same_files(one, other) -> bool:
    ours, theirs = tensors_of(one), tensors_of(other)
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == t.dtype
        and torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (ours[name], t)))
        for name, t in theirs.items()
    )
