"""The part of a calibration that is done, on disk: on a large model drawing takes hours, and
resumes where it was stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ..architectures import Inputs
from ..system.finite import check_finite
from ..system.tensor_files import TensorFile, write_tensors
from .drawing import Drawing

BAD_SOURCE = (
    "what the captions and pictures are encoded with is damaged: download the model's folder again"
)


class SavedBatches:
    """Finished batches of a calibration, or of what `what` says, one file each, and those that are being
    drawn."""

    def __init__(self, folder: Path, settings: str, what: str = "calibration batch"):
        self.folder, self.settings, self.what = folder, settings, what

    def done(self, number: int, make: Callable[[], Inputs]) -> Inputs:
        """A finished batch, made by `make` if it is not saved yet. Raises ValueError where the text
        encoder, the VAE or the drawing gave values that are not finite."""
        path = self.folder / f"batch_{number}.safetensors"
        if path.exists() and (file := TensorFile(path)).metadata.get("settings") == self.settings:
            return file.read_all()
        inputs = make()
        check_finite(inputs, f"{self.what} {number}", BAD_SOURCE)
        write_tensors(path, inputs, {"settings": self.settings})
        return inputs

    def have(self, numbers: Sequence[int]) -> bool:
        return all(self._is_mine(self.folder / f"batch_{number}.safetensors") for number in numbers)

    def keep(self, numbers: Sequence[int], drawings: Sequence[Drawing], step: int) -> None:
        """Saves batches that are drawn together, after this many steps: a step takes up to hours on
        a large model."""
        rows = zip(numbers, drawings, strict=True)
        tensors = {
            f"{number}.{name}": t for number, drawing in rows for name, t in drawing.tensors.items()
        }
        about = {"settings": self.settings, "step": str(step), "numbers": str(list(numbers))}
        write_tensors(self._together(numbers), tensors, about)

    def restore(self, numbers: Sequence[int], drawings: Sequence[Drawing]) -> int:
        """The number of steps done for batches that are drawn together, whose states are
        restored."""
        path = self._together(numbers)
        if not self._is_mine(path) or TensorFile(path).metadata["numbers"] != str(list(numbers)):
            return 0
        file = TensorFile(path)
        for number, drawing in zip(numbers, drawings, strict=True):
            drawing.restore({name: file.read(f"{number}.{name}") for name in drawing.tensors})
        return int(file.metadata["step"])

    def forget(self, numbers: Sequence[int]) -> None:
        self._together(numbers).unlink(missing_ok=True)

    def _together(self, numbers: Sequence[int]) -> Path:
        return self.folder / f"together_{numbers[0]}.safetensors"

    def _is_mine(self, path: Path) -> bool:
        return path.exists() and TensorFile(path).metadata.get("settings") == self.settings

    def remove(self) -> None:
        shutil.rmtree(self.folder)
