"""Runs a program in the tests' ComfyUI: python launch.py main.py --cpu --port 8199, or python launch.py -m pytest ..."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOST = ROOT / ".comfyui"


def main() -> None:
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
