"""Runs a program in the tests' ComfyUI: python launch.py main.py --cpu --port 8199, or python launch.py -m pytest ...

torchvision's compiled part needs CUDA; the schemas of its two operators are enough for what imports it.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HOST = ROOT / ".comfyui"
LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def register_operators() -> None:
    LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def main() -> None:
    register_operators()
    sys.path[0] = str(HOST)  # ComfyUI's own `nodes` come first,
    sys.path.append(str(ROOT))  # then the engine, for tests that compare with it
    if sys.argv[1] == "-m":
        del sys.argv[:2]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        del sys.argv[:1]
        sys.argv[0] = str(HOST / sys.argv[0])
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
