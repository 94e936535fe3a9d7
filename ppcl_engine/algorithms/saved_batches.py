"""What a calibration has made so far, on disk: drawing it takes hours on a large model, and goes on
where it was stopped."""

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
    """A calibration's batches that are done, a file each, and those that are being drawn."""

    def __init__(self, folder: Path, settings: str):
        self.folder, self.settings = folder, settings

    def done(self, number: int, make: Callable[[], Inputs]) -> Inputs:
        """Raises ValueError for what the text encoder, the VAE or the drawing gave, where it is not
        finite."""
        path = self.folder / f"batch_{number}.safetensors"
        if path.exists() and (file := TensorFile(path)).metadata.get("settings") == self.settings:
            return file.read_all()
        inputs = make()
        check_finite(inputs, f"calibration batch {number}", BAD_SOURCE)
        write_tensors(path, inputs, {"settings": self.settings})
        return inputs

    def have(self, numbers: Sequence[int]) -> bool:
        return all(self._is_mine(self.folder / f"batch_{number}.safetensors") for number in numbers)

    def keep(self, numbers: Sequence[int], drawings: Sequence[Drawing], step: int) -> None:
        """Batches that are drawn together, after so many steps: one is hours on a large model."""
        rows = zip(numbers, drawings, strict=True)
        tensors = {
            f"{number}.{name}": t for number, drawing in rows for name, t in drawing.tensors.items()
        }
        about = {"settings": self.settings, "step": str(step), "numbers": str(list(numbers))}
        write_tensors(self._together(numbers), tensors, about)

    def restore(self, numbers: Sequence[int], drawings: Sequence[Drawing]) -> int:
        """Steps done of batches that are drawn together, which then go on from there."""
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
