"""Runs a program in a ComfyUI: COMFYUI=.hosts/0.30.0/ComfyUI python launch.py main.py --cpu, or ...
launch.py -m pytest ..."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    if not os.environ.get("COMFYUI"):
        sys.exit("COMFYUI is not set; give the folder of a ComfyUI, and its Python as PYTHON")
    host = Path(os.environ["COMFYUI"]).resolve()
    if not (host / "main.py").exists():
        sys.exit(f"{host} has no main.py; set COMFYUI to the folder of a ComfyUI")
    if importlib.util.find_spec("torch") is None:
        sys.exit(f"{sys.executable} has no torch; set PYTHON to the Python of that ComfyUI")
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
