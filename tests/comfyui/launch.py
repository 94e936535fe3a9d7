"""Runs a program in a ComfyUI: COMFYUI=.hosts/0.30.0/ComfyUI python launch.py main.py --cpu, or ...
launch.py -m pytest ..."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    host = Path(os.environ.get("COMFYUI", "")).resolve()
    if not (host / "main.py").exists():
        sys.exit(f"{host} has no main.py; set COMFYUI to the folder of a ComfyUI")
    sys.path[0] = str(host)  # ComfyUI's own `nodes` come first,
    sys.path.append(str(ROOT))  # then the engine, for tests that compare with it
    if sys.argv[1] == "-m":
        del sys.argv[:2]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        del sys.argv[:1]
        sys.argv[0] = str(host / sys.argv[0])
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
