"""The kinds of changes in LoRA files, as mathematics: what is added to a weight.

A change is of the weight flattened to a matrix [rows, columns], in float32. `rank` is the size of
the inner dimension, and a missing alpha means a scale of 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

KINDS = {
    "lora": ({"up", "down"}, {"mid"}),
    "loha": ({f"hada_{w}_{f}" for w in ("w1", "w2") for f in "ab"}, {"hada_t1", "hada_t2"}),
    "glora": ({f"glora_{name}" for name in ("a1", "a2", "b1", "b2")}, set()),
    "oft": ({"oft_blocks"}, {"rescale"}),
    "diff": ({"diff"}, set()),
    "set": ({"set_weight"}, set()),
}
"""kind -> (the fields that each of its modules has, those that it may have); "lokr" besides"""
KRONECKER = {f"lokr_{w}{f}" for w in ("w1", "w2") for f in ("", "_a", "_b")} | {"lokr_t2"}
NORMS = {"dora_scale", "magnitude"}
"""fields that make a change one of norms, too"""
OF_WEIGHT = {"glora", "oft", "set"}
"""kinds that read the weight that they change"""
Tensors = Mapping[str, torch.Tensor]
"""a module's tensors by their fields, as in `lora_names.FIELDS`"""


@dataclass(frozen=True)
class LowRank:
    """The change scale * up @ down."""

    down: torch.Tensor
    """[rank, columns]"""
    up: torch.Tensor
    """[rows, rank]"""
    scale: float
    """alpha / rank"""

    def matrix(self) -> torch.Tensor:
        return self.scale * (self.up @ self.down)


def kind_of(fields: set[str]) -> str | None:
    """The kind of change that a module's fields make up; None where they make up none."""
    fields = fields - {"alpha"} - NORMS
    for kind, (needed, allowed) in KINDS.items():
        if needed <= fields <= needed | allowed:
            return kind
    factors = ({f"lokr_{w}"} for w in ("w1", "w2"))
    whole = all(
        factor <= fields or {f"{name}_{f}" for name in factor for f in "ab"} <= fields
        for factor in factors
    )
    return "lokr" if whole and fields <= KRONECKER else None


def change_of(kind: str, tensors: Tensors, weight: torch.Tensor, strength: float) -> torch.Tensor:
    """What is added to a module's weight [rows, columns], of which kinds and fields that are not in
    `OF_WEIGHT` and `NORMS` read nothing."""
    match kind:
        case "oft" if tensors["oft_blocks"].ndim == 4:
            return butterfly(tensors, weight, strength)
        case "oft":
            return rotated(tensors, weight, strength)
        case "set":
            return tensors["set_weight"].reshape(weight.shape) - weight
        case "glora":
            change = generalised(tensors, weight)
        case "lora":
            change = low_rank(tensors).matrix()
        case "loha":
            change = hadamard(tensors)
        case "lokr":
            change = kronecker(tensors)
        case _:
            change = tensors["diff"].reshape(tensors["diff"].shape[0], -1)
    if "dora_scale" in tensors:
        change = decomposed(change, tensors["dora_scale"], weight)
    elif "magnitude" in tensors:
        change = magnified(change, tensors["magnitude"], weight)
    return strength * change


def low_rank(tensors: Tensors) -> LowRank:
    """LoRA, with LoCon's middle factor [rank, rank, ...] multiplied into `down`."""
    down, up = tensors["down"], tensors["up"].flatten(1)
    scale = _scale(tensors, down.shape[0])
    if "mid" in tensors:
        down = torch.einsum("mn...,ni->mi...", tensors["mid"], down.flatten(1))
    return LowRank(down.flatten(1), up, scale)


def hadamard(tensors: Tensors) -> torch.Tensor:
    """LoHa: (A1 B1) * (A2 B2), element by element (arXiv 2108.06098)."""
    first, second = (_factor(tensors, "hada", n) for n in "12")
    return _scale(tensors, tensors["hada_w1_b"].shape[0]) * (first * second).flatten(1)


def kronecker(tensors: Tensors) -> torch.Tensor:
    """LoKr: W1 (x) W2, either of them whole or A B (LyCORIS, arXiv 2309.14859). alpha counts only
    where one is A B; the rank is W2's where both are."""
    ranks = [tensors[b].shape[0] for b in ("lokr_w2_b", "lokr_w1_b") if b in tensors]
    first, second = (_factor(tensors, "lokr", n) for n in "12")
    if second.ndim > 2:
        first = first.reshape(*first.shape, *(1,) * (second.ndim - 2))
    scale = _scale(tensors, ranks[0]) if ranks else 1.0
    return scale * torch.kron(first, second).flatten(1)


def generalised(tensors: Tensors, weight: torch.Tensor) -> torch.Tensor:
    """GLoRA: W A1 A2 + B1 B2, or of older trainers W A2 A1 + B2 B1 (arXiv 2306.07967)."""
    a1, a2, b1, b2 = (tensors[f"glora_{name}"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    if old and new:  # ranks as large as the matrix: only the old form is square then
        old = a2.shape[0] == weight.shape[0] == weight.shape[1]
    if old:
        return _scale(tensors, a1.shape[0]) * (b2 @ b1 + weight @ a2 @ a1)
    return _scale(tensors, a2.shape[0]) * (weight @ a1 @ a2 + b1 @ b2)


def rotated(tensors: Tensors, weight: torch.Tensor, strength: float) -> torch.Tensor:
    """OFT: s s (R - 1) W with one rotation R for every group of rows (arXiv 2306.07280). ComfyUI
    multiplies by the strength twice, and files are made to look right there."""
    rotations = _rotations(tensors)
    count, size, _ = rotations.shape
    grouped = weight.unflatten(0, (count, size))
    turned = torch.einsum("knm,knc->kmc", rotations - torch.eye(size), grouped)
    return strength**2 * turned.reshape(weight.shape)


def butterfly(tensors: Tensors, weight: torch.Tensor, strength: float) -> torch.Tensor:
    """BOFT: OFT in several steps, each on other groups of rows (arXiv 2311.06243); as in ComfyUI, the
    strength is both in each step and before the sum."""
    rotations = _rotations(tensors)
    size = rotations.shape[-1]
    turned = weight
    for step, rotation in enumerate(rotations):
        part = strength * rotation + (1 - strength) * torch.eye(size)
        groups = (2, 2**step * (size // 2))
        turned = turned.unflatten(0, (-1, *groups)).transpose(1, 2).flatten(0, 2)
        turned = torch.einsum("bij,bj...->bi...", part, turned.unflatten(0, (-1, size)))
        turned = turned.flatten(0, 1).unflatten(0, (-1, *reversed(groups)))
        turned = turned.transpose(1, 2).flatten(0, 2)
    return strength * (turned * tensors.get("rescale", torch.ones(1)) - weight)


def decomposed(change: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """DoRA (arXiv 2402.09353): the change that gives rows, or columns, of W + change the norms
    `scale`.

    As ComfyUI reads `dora_scale`: one norm a row is of W itself, one a column of W + change.
    """
    whole = weight + change
    rows = scale.shape[0] == weight.shape[0]
    scale = scale.reshape(-1, 1) if rows else scale.reshape(1, -1)
    norm = weight.norm(dim=1, keepdim=True) if rows else whole.norm(dim=0, keepdim=True)
    return whole * (scale / (norm + torch.finfo(weight.dtype).eps)) - weight


def magnified(change: torch.Tensor, norms: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """DoRA as PEFT's `lora_magnitude_vector`: rows of W + change get the norms [rows]."""
    whole = weight + change
    return whole * (norms.reshape(-1, 1) / whole.norm(dim=1, keepdim=True)) - weight


def _scale(tensors: Tensors, rank: int) -> float:
    return tensors["alpha"].item() / rank if "alpha" in tensors else 1.0


def _factor(tensors: Tensors, kind: str, number: str) -> torch.Tensor:
    """W1 or W2: whole, A B, or for convolutions Tucker's A, B and core T."""
    name = f"{kind}_w{number}"
    if name in tensors:
        return tensors[name]
    first, second = tensors[f"{name}_a"], tensors[f"{name}_b"]
    core = tensors.get(f"{kind}_t{number}")
    if core is None:
        return first @ second
    return torch.einsum("ij...,jr,ip->pr...", core, second, first)


def _rotations(tensors: Tensors) -> torch.Tensor:
    """Cayley's (1 + Q) (1 - Q)^-1 with Q = B - B^T, held within alpha where that is given."""
    blocks = tensors["oft_blocks"]
    skew = blocks - blocks.transpose(-1, -2)
    limit = tensors["alpha"].item() if "alpha" in tensors else 0.0
    norm = skew.norm() + 1e-8
    if 0 < limit < norm:
        skew = skew * limit / norm
    one = torch.eye(blocks.shape[-1])
    return (one + skew) @ (one - skew).inverse()
