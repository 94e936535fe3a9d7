"""LoRA files with a module of every kind that trainers write, at random."""

from __future__ import annotations

from pathlib import Path

import torch

from ppcl_engine.system.tensor_files import write_tensors

RANK = 3


def _pair(up: str, down: str, alpha: float | None = None):
    def make(rows: int, columns: int) -> dict[str, torch.Tensor]:
        tensors = {
            up: torch.randn(rows, RANK),
            down: torch.randn(RANK, columns),
        }
        return tensors | ({".alpha": torch.tensor(alpha)} if alpha else {})

    return make


def _loha(rows: int, columns: int) -> dict[str, torch.Tensor]:
    shapes = {"w1_a": (rows, RANK), "w1_b": (RANK, columns)}
    shapes |= {"w2_a": (rows, RANK), "w2_b": (RANK, columns)}
    return {f".hada_{n}": torch.randn(*s) for n, s in shapes.items()} | {
        ".alpha": torch.tensor(2.0)
    }


def _lokr(rows: int, columns: int) -> dict[str, torch.Tensor]:
    return {
        ".lokr_w1": torch.randn(2, 4),
        ".lokr_w2_a": torch.randn(rows // 2, RANK),
        ".lokr_w2_b": torch.randn(RANK, columns // 4),
        ".alpha": torch.tensor(1.5),
    }


def _lokr_of_factors(rows: int, columns: int) -> dict[str, torch.Tensor]:
    return {
        ".lokr_w1_a": torch.randn(2, RANK),
        ".lokr_w1_b": torch.randn(RANK, 2),
        ".lokr_w2": torch.randn(rows // 2, columns // 2),
        ".alpha": torch.tensor(1.5),
    }


def _glora(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """W A1 A2 + B1 B2."""
    return {
        ".a1.weight": torch.randn(columns, RANK),
        ".a2.weight": torch.randn(RANK, columns),
        ".b1.weight": torch.randn(rows, RANK),
        ".b2.weight": torch.randn(RANK, columns),
    }


def _old_glora(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """W A2 A1 + B2 B1."""
    return {
        ".a1.weight": torch.randn(RANK, columns),
        ".a2.weight": torch.randn(columns, RANK),
        ".b1.weight": torch.randn(RANK, columns),
        ".b2.weight": torch.randn(rows, RANK),
    }


def _dora(norms: str):
    def make(rows: int, columns: int) -> dict[str, torch.Tensor]:
        shape = (rows, 1) if norms == "rows" else (1, columns)
        pair = _pair(".lora_up.weight", ".lora_down.weight", 2.0)(rows, columns)
        return pair | {".dora_scale": 1 + torch.rand(shape)}

    return make


KINDS = {
    "kohya": _pair(".lora_up.weight", ".lora_down.weight", 2.0),
    "PEFT": _pair(".lora_B.weight", ".lora_A.weight"),
    "PEFT, named": _pair(".lora_B.default.weight", ".lora_A.default.weight"),
    "PEFT, no leaf": _pair(".lora_B", ".lora_A"),
    "diffusers": _pair("_lora.up.weight", "_lora.down.weight"),
    "diffusers, older": _pair(".lora.up.weight", ".lora.down.weight"),
    "transformers": _pair(".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight", 1.0),
    "LoHa": _loha,
    "LoKr": _lokr,
    "LoKr of factors": _lokr_of_factors,
    "GLoRA": _glora,
    "GLoRA, older": _old_glora,
    "DoRA by rows": _dora("rows"),
    "DoRA by columns": _dora("columns"),
    "OFT": lambda rows, columns: {
        ".oft_blocks": 0.3 * torch.randn(rows // 4, 4, 4),
        ".alpha": torch.tensor(1.0),
    },
    "BOFT": lambda rows, columns: {
        ".oft_blocks": 0.3 * torch.randn(2, rows // 4, 4, 4),
        ".rescale": 1 + torch.rand(rows, 1),
        ".alpha": torch.tensor(1.0),
    },
    "full": lambda rows, columns: {".diff": torch.randn(rows, columns)},
    "lightx2v, with a bias": lambda rows, columns: {
        **_pair(".lora_up.weight", ".lora_down.weight")(rows, columns),
        ".diff_b": torch.randn(rows),
    },
    "set": lambda rows, columns: {".set_weight": torch.randn(rows, columns)},
}
"""kind -> makes a module's tensors, by the endings of their names, for a weight [rows, columns]"""


def module_of(kind: str, name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """A module's tensors, by their names in a file."""
    return {name + ending: tensor for ending, tensor in KINDS[kind](rows, columns).items()}


def write_lora(path: Path, matrices: dict[str, tuple[int, int]], kinds: tuple[str, ...], seed=0):
    """A file with a module for each of these matrices, of one kind after the other; small changes."""
    torch.manual_seed(seed)
    tensors = {}
    for number, (name, shape) in enumerate(matrices.items()):
        tensors |= module_of(kinds[number % len(kinds)], name, *shape)
    shrink = ("up.weight", "lora_B.weight", "w1_a", "lokr_w2_a")
    small = {n: t * (0.1 if n.endswith(shrink) else 1) for n, t in tensors.items()}
    write_tensors(path, small)
    return path
