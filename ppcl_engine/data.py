"""Calibration sets: what a block sees in real use, in batches of one shape each, in one file.

A batch is an architecture's inputs (latent tokens, timestep, text, mask, grid). Where the clean
picture is known (`clean`), training draws new noise and timesteps for it every round.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from . import flow
from .architectures import Inputs
from .files import TensorFile, write_tensors

CLEAN = "clean"
KIND = "ppcl_calibration"
PICTURES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass
class CalibrationSet:
    """batches: inputs by diffusers' names, on the CPU, `clean` [n, tokens, channels] among them or not;
    origin: how it was made (architecture, model fingerprint, seed, source); rows: takes those rows of a batch that the
    methods give, which is all of them unless several processes share it."""

    batches: list[Inputs]
    origin: dict = field(default_factory=dict)
    rows: Callable[[Inputs], Inputs] = lambda inputs: inputs

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def samples(self) -> int:
        return sum(len(batch["timestep"]) for batch in self.batches)

    @property
    def hash(self) -> str:
        digest = hashlib.sha256(json.dumps(self.origin, sort_keys=True).encode())
        for batch in self.batches:
            for name in sorted(batch):
                digest.update(name.encode() + batch[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def inputs(self, batch: int) -> Inputs:
        return self.rows(self._whole(batch))

    def all_inputs(self) -> list[Inputs]:
        return [self.inputs(batch) for batch in range(len(self))]

    def fresh(self, batch: int, seed: int) -> Inputs:
        """The batch with new noise and timesteps, uniform in t; as recorded where no clean picture is known."""
        clean = self.batches[batch].get(CLEAN)
        if clean is None:
            return self.inputs(batch)
        timestep, noise = _drawn(clean, seed)
        noisy = flow.noised(clean.float(), noise, timestep)
        return self.rows({**self._whole(batch), "hidden_states": noisy, "timestep": timestep})

    def data_velocity(self, batch: int, seed: int) -> torch.Tensor:
        """noise - clean of `fresh(batch, seed)`. Raises ValueError where no clean picture is known."""
        clean = self.batches[batch].get(CLEAN)
        if clean is None:
            raise ValueError("this calibration set knows no clean pictures; calibrate with --images, or use --data 0")
        return self.rows({"velocity": _drawn(clean, seed)[1] - clean.float()})["velocity"]

    def split(self, held_out: int) -> tuple[CalibrationSet, CalibrationSet]:
        """(the first batches, the last `held_out`). Raises ValueError when nothing would be left."""
        if not 0 < held_out < len(self):
            raise ValueError(f"calibration has {len(self)} batches, so {held_out} cannot be held out; calibrate more")
        return replace(self, batches=self.batches[:-held_out]), replace(self, batches=self.batches[-held_out:])

    def check_model(self, architecture: str, fingerprint: str, where: object) -> None:
        expected = (self.origin.get("architecture"), self.origin.get("fingerprint"))
        if expected != (architecture, fingerprint):
            raise ValueError(f"{where} was calibrated on another model; run calibrate on this one")

    def _whole(self, batch: int) -> Inputs:
        return {name: t for name, t in self.batches[batch].items() if name != CLEAN}


def _drawn(clean: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(timestep [n], noise as `clean`)"""
    generator = torch.Generator().manual_seed(seed)
    timestep = torch.rand(len(clean), generator=generator)
    return timestep, torch.randn(clean.shape, generator=generator)


def save_calibration(path: Path, calibration: CalibrationSet) -> None:
    tensors = {f"{i}.{name}": t for i, batch in enumerate(calibration.batches) for name, t in batch.items()}
    write_tensors(path, tensors, {KIND: json.dumps(calibration.origin)})


def load_calibration(path: Path) -> CalibrationSet:
    """Raises ValueError when the file is missing, not safetensors, or holds something else."""
    if not Path(path).exists():
        raise ValueError(f"{path} does not exist; run calibrate first")
    file = TensorFile(path)
    if KIND not in file.metadata:
        raise ValueError(f"{path} is no calibration set; run calibrate")
    batches: dict[int, Inputs] = {}
    for key in file.keys():
        number, name = key.split(".", 1)
        batches.setdefault(int(number), {})[name] = file.read(key)
    return CalibrationSet([batches[i] for i in sorted(batches)], json.loads(file.metadata[KIND]))


def caption_file(path: Path) -> list[str]:
    """One caption a line; blank lines are empty captions. Raises ValueError for a missing or empty file."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a text file with one caption a line")
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines:
        raise ValueError(f"{path} is empty; write one caption a line")
    return [line.strip() for line in lines]


def _pictures(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES) if folder.is_dir() else []
    if not found:
        raise ValueError(f"{folder} holds no pictures (.png .jpg .webp); give a folder of pictures with captions")
    return found


def picture_files(folder: Path) -> list[tuple[Path, str]]:
    """Pictures with a .txt of the same name beside them, sorted. Raises ValueError naming one without."""
    pictures = _pictures(folder)
    for picture in pictures:
        if not picture.with_suffix(".txt").exists():
            raise ValueError(f"{picture} has no caption; write it into {picture.with_suffix('.txt').name}")
    return [(picture, picture.with_suffix(".txt").read_text(encoding="utf-8").strip()) for picture in pictures]


def reference_files(folder: Path, pictures: Sequence[Path]) -> list[list[Path]]:
    """Of each picture those that it was made from: cat.png of cat.png, or cat_1.png, cat_2.png, ... Raises ValueError
    naming a picture without one."""
    by_name = {path.stem: path for path in _pictures(folder)}
    return [_references_of(picture, by_name, folder) for picture in pictures]


def _references_of(picture: Path, by_name: dict[str, Path], folder: Path) -> list[Path]:
    if picture.stem in by_name:
        return [by_name[picture.stem]]
    numbers = (name.removeprefix(f"{picture.stem}_") for name in by_name if name.startswith(f"{picture.stem}_"))
    found = [by_name[f"{picture.stem}_{n}"] for n in sorted((n for n in numbers if n.isdecimal()), key=int)]
    if not found:
        raise ValueError(
            f"{folder} has no reference of {picture.name}; put {picture.stem}.png there, or {picture.stem}_1.png and so on"
        )
    return found


def load_references(rows: Sequence[Sequence[Path]], size: tuple[int, int]) -> torch.Tensor:
    """[n, k, 3, height, width]: `load_pictures` of k references each."""
    return torch.stack([load_pictures(row, size) for row in rows])


def load_pictures(paths: Sequence[Path], size: tuple[int, int]) -> torch.Tensor:
    """[n, 3, height, width] in [0, 1], each resized to cover `size` and cropped at its centre."""
    import numpy as np
    from PIL import Image, ImageOps

    height, width = size
    rows = [ImageOps.fit(Image.open(p).convert("RGB"), (width, height), Image.Resampling.LANCZOS) for p in paths]
    return torch.stack([torch.from_numpy(np.asarray(r, dtype=np.float32) / 255) for r in rows]).movedim(-1, 1)
