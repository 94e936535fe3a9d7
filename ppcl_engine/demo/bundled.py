"""Where the bundled teachers are, and pictures with captions like those that they were trained on."""

from __future__ import annotations

from pathlib import Path

import torch

from ..data.rendered.captions import random_captions, render

TEACHER = Path(__file__).with_name("teacher.safetensors")
BUNDLE = TEACHER.with_name("demo.ppcl.safetensors")
"""of the first of the teachers"""
TEACHERS = {"qwen": TEACHER, "flux": TEACHER.with_name("teacher_flux.safetensors")}


def bundled(name: str) -> Path:
    """The file of a small teacher. Raises ValueError if it does not exist."""
    if not TEACHERS[name].exists():
        raise ValueError(
            f"{TEACHERS[name]} does not exist; make it with `python -m ppcl_engine.demo.train --teacher {name}`"
        )
    return TEACHERS[name]


def render_pictures(folder: Path, count: int, seed: int) -> Path:
    """Writes `count` rendered pictures, each with its caption in a .txt beside it. Returns the folder."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    captions = random_captions(count, generator)
    for index, (caption, picture) in enumerate(
        zip(captions, render(captions, generator), strict=True)
    ):
        pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{index:04d}.png")
        (folder / f"{index:04d}.txt").write_text(caption.text() + "\n", encoding="utf-8")
    return folder
