"""Other tools' weights in `.bin` files: tensors only, mapped from disk and copied one at a time.

We write no pickle. A file that holds anything but tensors is refused before any of it runs.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch

from .headers import DTYPE_NAMES
from .regular_files import check_regular, identity_of


class PickledFile:
    """A `.bin` of tensors by name, read like a `TensorFile`. Raises ValueError naming the file for
    anything else."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.identity = identity_of(check_regular(self.path))
        if not zipfile.is_zipfile(self.path):
            raise ValueError(
                f"{path} is truncated or not a PyTorch file; copy or download it again"
            )
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise ValueError(
                f"{path} holds code or objects, not tensors alone; it was not opened"
            ) from None
        except (
            Exception
        ) as error:  # a damaged file makes the unpickler raise anything, and torch passes it on
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise ValueError(f"{path} cannot be read ({reason}); download it again") from None
        if not isinstance(content, dict) or not all(map(_is_named_tensor, content.items())):
            raise ValueError(
                f"{path} is not a plain dict of tensors; save the model's state_dict alone"
            )
        self._tensors: dict[str, torch.Tensor] = dict(content)

    def keys(self) -> list[str]:
        return list(self._tensors)

    def stored_as(self, name: str) -> str:
        """The dtype by safetensors' name."""
        return DTYPE_NAMES.get(self._tensors[name].dtype, str(self._tensors[name].dtype))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def read(self, name: str, rows: int | None = None, start: int = 0) -> torch.Tensor:
        """The tensor, or some of its rows: a copy in memory, which no longer depends on the
        file."""
        tensor = self._tensors[name]
        return (tensor if rows is None else tensor[start : start + rows]).clone()


def _is_named_tensor(item: tuple[object, object]) -> bool:
    name, tensor = item
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        return False
    return (
        tensor.layout is torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
    )
