"""Affine maps of a block's streams, such as the probes, which stand in for blocks."""

from __future__ import annotations

from pathlib import Path

import torch

from ...architectures import BlockState
from ...system.tensor_files import TensorFile

Maps = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""stream -> (weight, bias)"""
PROBED_STREAMS = ("image", "text", "joint")


def load_probe(path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """stream -> (weight, bias). Raises ValueError when the probe is missing."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; run probe first")
    file = TensorFile(path)
    streams = [name.removesuffix(".weight") for name in file.keys() if name.endswith(".weight")]
    for stream in streams:
        width = file.shape(f"{stream}.bias")
        if (
            stream not in PROBED_STREAMS
            or len(width) != 1
            or file.shape(f"{stream}.weight") != width * 2
        ):
            raise ValueError(
                f"{path}: {stream[:40]} is not a square map of a stream and its bias; run probe again"
            )
    return {
        stream: (file.read(f"{stream}.weight"), file.read(f"{stream}.bias")) for stream in streams
    }


def apply_maps(state: BlockState, maps: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> BlockState:
    """x + W x + b on each stream that has a map."""
    streams = {"image": state.image, "text": state.text}
    for stream, (weight, bias) in maps.items():
        x = streams[stream]
        streams[stream] = x + x @ weight.T.to(x) + bias.to(x)
    return state.with_streams(**streams)
