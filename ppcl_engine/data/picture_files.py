"""Pictures, captions and references in folders, and captions in a text file."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch

from ..system.texts import check_line_ends, lines_of, read_text
from .photos import READ, picture_names, read_picture
from .shards import Sample


def caption_file(path: Path) -> list[str]:
    """One caption a line; blank lines are empty captions. Raises ValueError for a missing or empty
    file."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a text file with one caption a line")
    text = read_text(path)
    check_line_ends(text, path)
    lines = lines_of(text)
    if not lines:
        raise ValueError(f"{path} is empty; write one caption a line")
    return [line.strip() for line in lines]


def _pictures(folder: Path) -> list[Path]:
    """The folder's pictures; a line to stderr names other files that are left out."""
    pictures, others = picture_names(folder) if folder.is_dir() else ([], [])
    if not pictures:
        raise ValueError(
            f"{folder} holds no pictures ({' '.join(READ)}); give a folder of pictures with captions"
        )
    if others:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        print(
            f"{folder}: {others[0].name}{more} left out; read are {' '.join(READ)}", file=sys.stderr
        )
    return pictures


def picture_files(folder: Path) -> list[tuple[Path, str]]:
    """Pictures, sorted, each with the caption in a .txt of the same name. Raises ValueError naming
    a picture without one."""
    pictures = _pictures(folder)
    for picture in pictures:
        if not picture.with_suffix(".txt").exists():
            raise ValueError(
                f"{picture} has no caption; write it into {picture.with_suffix('.txt').name}"
            )
    return [(picture, read_text(picture.with_suffix(".txt")).strip()) for picture in pictures]


def unpack_pictures(samples: Iterable[tuple[str, Sample]], folder: Path, most: int) -> None:
    """Writes the pictures of the first `most` samples of tar shards into a folder, as `picture_files`
    reads them. Raises ValueError naming a sample without a picture or a caption."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, (where, sample) in enumerate(islice(samples, most)):
        endings = [ending for ending in sample if f".{ending}" in READ]
        if not endings or "txt" not in sample:
            absent = "caption (.txt)" if endings else f"picture ({' '.join(READ)})"
            raise ValueError(f"{where} has no {absent}, and is no pair that `ppcl data` made")
        (folder / f"{number:09d}.{endings[0]}").write_bytes(sample[endings[0]])
        (folder / f"{number:09d}.txt").write_bytes(sample["txt"])


def reference_files(folder: Path, pictures: Sequence[Path]) -> list[list[Path]]:
    """The pictures that each picture was made from: cat.png for cat.png, or cat_1.png, cat_2.png,
    ...

    Raises ValueError naming a picture without a reference.
    """
    by_name = {path.stem: path for path in _pictures(folder)}
    return [_references_of(picture, by_name, folder) for picture in pictures]


def _references_of(picture: Path, by_name: dict[str, Path], folder: Path) -> list[Path]:
    if picture.stem in by_name:
        return [by_name[picture.stem]]
    numbers = (
        name.removeprefix(f"{picture.stem}_")
        for name in by_name
        if name.startswith(f"{picture.stem}_")
    )
    references = [
        by_name[f"{picture.stem}_{n}"]
        for n in sorted((n for n in numbers if n.isdecimal()), key=int)
    ]
    if not references:
        raise ValueError(
            f"{folder} has no reference of {picture.name}; put {picture.stem}.png there, or {picture.stem}_1.png and so on"
        )
    return references


def check_pictures(paths: Iterable[Path]) -> None:
    """Reads each, before the hours that others may take. Raises ValueError naming the first that
    cannot be read."""
    for path in paths:
        read_picture(path)


def load_references(rows: Sequence[Sequence[Path]], size: tuple[int, int]) -> torch.Tensor:
    """[n, k, 3, height, width]: `load_pictures` for k references each."""
    return torch.stack([load_pictures(row, size) for row in rows])


def load_pictures(paths: Sequence[Path], size: tuple[int, int]) -> torch.Tensor:
    """[n, 3, height, width] in [0, 1], each resized to cover `size` and cropped at its centre, read
    as in `photos`."""
    import numpy as np
    from PIL import Image, ImageOps

    height, width = size
    rows = [
        ImageOps.fit(read_picture(path), (width, height), Image.Resampling.LANCZOS)
        for path in paths
    ]
    return torch.stack(
        [torch.from_numpy(np.asarray(r, dtype=np.float32) / 255) for r in rows]
    ).movedim(-1, 1)
