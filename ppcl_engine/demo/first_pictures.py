"""What the bundle that comes with the package draws, before anything is trained."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path

import torch

from ..data.codecs import open_codec
from ..data.rendered.captions import random_captions
from ..data.sampling import draw_prompts, encode_prompts
from ..models.bundle import Bundle
from ..models.opening import open_model
from ..report.drawings.picture_sheet import picture_sheet
from ..settings.assess_settings import DemoConfig
from ..system.atomic import replacing
from ..system.machine import resolve_device
from .bundled import BUNDLE, TEACHER

NAME = "first_pictures.png"
DRAWN, STEPS, GUIDANCE = 6, 20, 2.0


def first_pictures(config: DemoConfig, folder: Path, steps: int) -> Path:
    """Writes a sheet of the same captions, from the same noise, a row for each variant of the
    bundle. Returns its path."""
    device, path = resolve_device(config.device), folder / NAME
    codec, variants = open_codec(TEACHER, device), Bundle(BUNDLE).plan.variants
    captions = [
        c.text() for c in random_captions(DRAWN, torch.Generator().manual_seed(config.seed))
    ]
    prompts = encode_prompts(codec, captions)
    pictures = {}
    for variant in variants:
        model = open_model(BUNDLE, variant.name, TEACHER, torch.float32, device)
        latents = draw_prompts(
            Bundle(BUNDLE).architecture,
            model,
            prompts,
            config.seed,
            steps,
            GUIDANCE,
            DRAWN,
            f"draw {variant.name}",
        )
        pictures[variant.name] = (codec.pictures(latents) * 255).round().byte()
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(picture_sheet(list(pictures), captions, pictures))
    return path


def show_in_browser(path: Path) -> None:
    """Opens a file where somebody sits in front of a graphical screen."""
    screen = os.name == "nt" or sys.platform == "darwin"
    screen = screen or bool({"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ))
    if screen and sys.stdout.isatty():
        webbrowser.open(path.absolute().as_uri())
