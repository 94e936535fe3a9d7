"""How many tokens the pictures have that a calibration will draw or read."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from ..data.codecs import open_codec
from ..data.codecs.table import has_tables
from ..settings.prune_settings import CalibrateConfig

GRID = (1, 64, 64)  # 1024 x 1024 pixels
PIXELS_A_TOKEN = 16  # height and width


def grid_of(config: CalibrateConfig) -> tuple[int, int, int]:
    """The grid of the pictures that calibrate will draw or read: as asked for, or the model's own size where
    it is cheap to know."""
    model = Path(config.model)
    rows, columns, pixels = _usual_grid(model, model.stat().st_mtime_ns if model.is_file() else 0)
    return 1, config.height // pixels or rows, config.width // pixels or columns


@lru_cache(maxsize=16)
def _usual_grid(model: Path, changed: int) -> tuple[int, int, int]:
    """Rows and columns of tokens in a picture of the model's usual size, and pixels along a token;
    `changed`: when its file was, 0 for what is not a file."""
    if not changed or not has_tables(model):
        return *GRID[1:], PIXELS_A_TOKEN
    codec = open_codec(model)
    pixels = 2 * codec.pixels_per_latent
    rows, columns = (side // pixels for side in codec.picture_size)
    return rows, columns, pixels
