"""Pictures as people have them, made upright, on white, in eight bits. A picture that cannot be
read is named in one line."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


READ = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
WHITE = (255, 255, 255, 255)
ORIENTATION = 0x0112  # of EXIF
SIXTEEN_BITS = {"I;16", "I;16L", "I;16B", "I;16N"}
TRANSPARENT = {"RGBA", "RGBa", "LA", "La", "PA"}


def picture_names(folder: Path) -> tuple[list[Path], list[Path]]:
    """The pictures of a folder, sorted, and the files that are neither a picture nor its caption.

    Hidden files, among them macOS' ._ files, are left out.
    """
    files = sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.is_file())
    pictures = [p for p in files if p.suffix.lower() in READ]
    return pictures, [p for p in files if p.suffix.lower() not in (*READ, ".txt")]


def read_picture(path: Path) -> Image:
    """RGB; transparent parts become white. Raises ValueError naming the file; one that is too large
    is refused before it is decoded."""
    from PIL import Image

    try:
        # of sizes that are still fine, and of damaged notes beside the pixels
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as picture:
                return _upright(
                    _on_white(_eight_bits(picture)), picture.getexif().get(ORIENTATION, 1)
                )
    except Image.DecompressionBombError as error:
        pixels, most = (int(number) for number in re.findall(r"\d+", str(error))[:2])
        size = f"{pixels / 1e6:,.0f} megapixels, more than the {most / 1e6:,.0f} that are read"
        raise ValueError(f"{path} has {size}; make it smaller") from None
    except Exception as error:  # Pillow's decoders raise many kinds of errors for a broken file
        reason = (
            str(error)
            if isinstance(error, ValueError)
            else "it is damaged, or of a kind that is not read"
        )
        raise ValueError(
            f"{path} cannot be read as a picture ({reason}); save it again, or take it out"
        ) from None


def _eight_bits(picture: Image) -> Image:
    """The upper eight bits of sixteen-bit grey, rounded. Raises ValueError where no value is agreed
    to be white."""
    from PIL import Image

    mode = picture.mode
    if mode == "F" or (mode == "I" and picture.format != "PNG"):
        raise ValueError("its values have 32 bits, and no value is agreed to be white")
    if mode not in SIXTEEN_BITS | {"I"}:
        return picture
    values = np.array(picture).astype(np.int64)
    if (clear := picture.info.get("transparency")) is not None:
        values[values == clear] = 65_535
    return Image.fromarray(((values + 128) // 257).clip(0, 255).astype(np.uint8))


def _on_white(picture: Image) -> Image:
    from PIL import Image

    if picture.mode not in TRANSPARENT and "transparency" not in picture.info:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, WHITE), picture).convert("RGB")


def _upright(picture: Image, orientation: int) -> Image:
    """Turned as the camera was held."""
    from PIL import ImageOps

    picture.getexif()[ORIENTATION] = orientation
    return ImageOps.exif_transpose(picture)
