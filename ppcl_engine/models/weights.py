"""A full transformer's weights in any known layout, read tensor by tensor.

Read: a diffusers transformer folder (sharded or not, safetensors or pickled tensors), a diffusers
pipeline folder, a ComfyUI single file or checkpoint (bf16, fp16, the formats of `scales`), a GGUF
file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..architectures import ARCHITECTURES, Architecture, Part
from ..architectures.shapes import Shapes, block_shapes, number_of_values, outer_shapes
from ..system.json_text import shown
from .filling import fill
from .layout import Layout, full_layout
from .model_configs import check_model_config, sizes_that_differ
from .other_models import refuse_inputs, refuse_kinds, refuse_shard, unknown_model
from .scales import IGNORED_SUFFIXES, SCALE_SUFFIXES, scales_of, shape_in
from .stored_layout import (
    COMFYUI_PREFIX,
    HINTS_TENSOR,
    STRUCTURE_TENSOR,
    OpenFile,
    StoredTensors,
    as_tensor,
    hints_in,
    object_in,
    open_layout,
    text_in,
    transformer_folder,
)
from .teacher_hashes import ExpectedBase

__all__ = [
    "COMFYUI_PREFIX",
    "HINTS_TENSOR",
    "IGNORED_SUFFIXES",
    "SCALE_SUFFIXES",
    "STRUCTURE_TENSOR",
    "Weights",
    "as_tensor",
    "expected_shapes",
    "fingerprint_of",
    "full_parameters",
    "hints_in",
    "object_in",
    "open_layout",
    "parameter_count",
    "parts_in",
    "stored_count",
    "text_in",
    "transformer_folder",
    "usual_name",
]


class Weights:
    """A transformer's tensors by diffusers' names, read one at a time.

    Attributes: path, architecture, config (diffusers' names), fingerprint. Raises ValueError for a
    file of no known architecture, for a configuration that its tensors contradict, for missing or
    unexpected tensors, and for quantised weights in a format that is not read.
    """

    kind = "full model"
    plan = None

    def __init__(self, path: Path):
        self.path = Path(path)
        stored, config = open_layout(self.path)
        refuse_kinds(stored, self.path)
        metadata = {}
        for file in {id(file): file for file, _ in stored.values()}.values():
            metadata |= getattr(file, "metadata", {})
        self._scales = scales_of(stored, metadata, self.path)
        self._expected: ExpectedBase | None = None
        self.architecture: Architecture = _architecture_of(stored, self.path)
        self._tensors = _parts_of(self.architecture, stored)
        inferred = self._inferred(stored)
        self.config: dict = check_model_config(
            self.architecture.name, config or inferred, self.path
        )
        self._check_config(inferred)
        self._check_keys()
        self._check_dtypes()

    @property
    def num_blocks(self) -> int:
        return self.architecture.num_blocks(self.config)

    @property
    def layout(self) -> Layout:
        return full_layout(self.num_blocks)

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        file, name, part = self._tensors[key]
        shape = shape_in((file, name), part.name, self._scales)
        return shape if part.of == 1 else (shape[0] // part.of * len(part.pieces), *shape[1:])

    def dtype(self, key: str) -> torch.dtype:
        """As stored."""
        file, name, _ = self._tensors[key]
        return file.dtype(name)

    def identity(self, key: str) -> object:
        """The file that the tensor is in, as it was opened."""
        return self._tensors[key][0].identity

    def is_scaled(self, key: str) -> bool:
        """Whether the real values are the stored ones times a scale."""
        return self._tensors[key][2].name in self._scales

    def expect(self, base: ExpectedBase | None) -> list[str]:
        """From now on every tensor that is read must be the one that a bundle expects. Returns
        notes on what cannot be compared."""
        self._expected = base
        return base.notes(self) if base is not None else []

    def stored(self, key: str) -> torch.Tensor:
        """The values as stored, without their scale."""
        return _read_part(*self._tensors[key])

    def read(self, key: str, dtype: torch.dtype | None = None, device: str = "cpu") -> torch.Tensor:
        """The tensor in `dtype` (default: as stored; a quantised one becomes bf16).

        A tensor that grows is moved first and cast on the device: half the bytes to move, and
        casting fp8 is slow on a CPU.
        """
        part, tensor = self._tensors[key][2], self.stored(key)
        if self._expected is not None:
            self._expected.check(self, key, tensor)
        if dtype is None or tensor.dtype.itemsize <= dtype.itemsize:
            tensor = tensor.to(device)
        scale = self._scales.get(part.name)
        if scale is not None:
            tensor = scale.apply(tensor, part).to(dtype or torch.bfloat16)
        return (tensor if dtype is None else tensor.to(dtype)).to(device)

    def module(self, module: nn.Module, prefix: str, dtype: torch.dtype, device: str) -> nn.Module:
        """The module (on any device, also meta) filled with the tensors under `prefix`; eval, no
        gradients."""
        return fill(
            module, lambda name: self.read(prefix + name, dtype, device), dtype, device, self.path
        )

    def block(self, index: int, dtype: torch.dtype, device: str) -> nn.Module:
        with torch.device("meta"):
            empty = self.architecture.build_block(self.config, index)
        return self.module(empty, self.architecture.block_prefix(self.config, index), dtype, device)

    def outer(self, dtype: torch.dtype, device: str) -> nn.Module:
        return self.module(self.architecture.build_outer(self.config), "", dtype, device)

    @property
    def fingerprint(self) -> str:
        """Hash of all names and shapes, and of the values of all vectors (biases, norms).

        Vectors are a millionth of the weights, so this reads kilobytes of a 40 GB model.
        """
        shapes = {key: self.shape(key) for key in self._tensors}
        return fingerprint_of(self.architecture, shapes, lambda key: self.read(key, torch.float32))

    def _inferred(self, stored: StoredTensors) -> dict:
        """The configuration that the shapes imply. Raises ValueError for a missing tensor, or one
        of another kind."""
        marks = [name for name in self.architecture.marks if name in stored]

        def shape(key: str) -> tuple[int, ...]:
            if key not in self._tensors:
                refuse_shard(self.path, key)
                raise ValueError(f"{self.path} lacks the tensor {key}; it is incomplete")
            return self.shape(key)

        try:
            return self.architecture.infer_config(shape, [*self._tensors, *marks])
        except (
            ValueError,
            IndexError,
            ZeroDivisionError,
        ) as error:  # a number of dimensions that no such model has
            if str(error).startswith(str(self.path)):
                raise
            raise ValueError(
                f"{self.path} is named like {self.architecture.name}, but its tensors have other shapes; is it another model?"
            ) from None

    def _check_config(self, inferred: dict) -> None:
        lists = self.architecture.released.lists.values() if self.architecture.released else ()
        pruned = [name for name in lists if self.config.get(name)]
        if pruned:
            raise ValueError(
                f"{self.path} is width-pruned ({pruned[0]} in its config.json), so no full model is in it; "
                "`ppcl import` makes a bundle or a standalone of it"
            )
        if odd := sizes_that_differ(self.config, inferred):
            said, told = self.config[odd[0]], inferred[odd[0]]
            raise ValueError(
                f"{self.path}: its configuration says {odd[0]} {said}, its tensors {told}; restore it"
            )
        refuse_inputs(self.architecture, self.config, self.path)

    def _check_keys(self) -> None:
        """Blocks first, by names alone: nothing is built from a configuration that names more
        blocks than exist."""
        prefixes = [
            self.architecture.block_prefix(self.config, index) for index in range(self.num_blocks)
        ]
        there = {".".join(key.split(".")[:2]) + "." for key in self._tensors}
        gaps = [prefix.rstrip(".") for prefix in prefixes if prefix not in there]
        if gaps:
            refuse_shard(self.path, f"{len(gaps)} of {len(prefixes)} blocks")
            raise ValueError(
                f"{self.path} lacks {len(gaps)} of {len(prefixes)} blocks, first {gaps[0]}: a full model's blocks are "
                "numbered without gaps; export it again, or download it again"
            )
        expected = expected_shapes(self.architecture, self.config)
        missing = sorted(set(expected) - set(self._tensors))
        unknown = sorted(set(self._tensors) - set(expected))
        wrong = [
            key for key in expected if key in self._tensors and self.shape(key) != expected[key]
        ]
        if missing:
            refuse_shard(self.path, missing[0])
            raise ValueError(
                f"{self.path} lacks {len(missing)} tensors, first {missing[0]}; it is incomplete"
            )
        if unknown:
            raise ValueError(
                f"{self.path} has {len(unknown)} tensors that the model does not have, first {shown(unknown[0])}; is it another model?"
            )
        if wrong:
            raise ValueError(
                f"{self.path}: {wrong[0]} has shape {self.shape(wrong[0])}, not {expected[wrong[0]]}"
            )

    def _check_dtypes(self) -> None:
        for key in self._tensors:
            if not (self.dtype(key).is_floating_point or self.is_scaled(key)):
                raise ValueError(
                    f"{self.path}: {key} is {self.dtype(key)}, not numbers of a model; download it again"
                )


def _architecture_of(stored: StoredTensors, path: Path) -> Architecture:
    """Raises ValueError, naming what the file looks like, for no known architecture."""
    for architecture in ARCHITECTURES:
        if architecture.detect(stored):
            return architecture
    raise ValueError(unknown_model(stored, path))


def _parts_of(
    architecture: Architecture, stored: StoredTensors
) -> dict[str, tuple[OpenFile, str, Part]]:
    """diffusers' name -> file, name in it, which of its rows."""
    others = {
        "scaled_fp8",
        STRUCTURE_TENSOR,
        HINTS_TENSOR,
        *architecture.marks,
        *architecture.unread,
    }
    names = [name for name in stored if not name.endswith(IGNORED_SUFFIXES) and name not in others]
    parts = parts_in(architecture, names)
    return {key: (*stored[part.name], part) for key, part in parts.items()}


def parts_in(architecture: Architecture, names: Iterable[str]) -> dict[str, Part]:
    """diffusers' name -> where it lies among tensors of these names, which are diffusers' or
    ComfyUI's."""
    keys = {key: name for name in names for key in architecture.from_comfyui(name)}
    return {
        key: Part(name) if key == name else replace(architecture.to_comfyui(key, keys), name=name)
        for key, name in keys.items()
    }


def usual_name(architecture: Architecture, name: str) -> str:
    """A tensor's name in the spelling of ComfyUI's files (newer hosts spell FLUX' norms in another
    way)."""
    key = architecture.from_comfyui(name)[0]
    return name if key == name else architecture.to_comfyui(key, (key,)).name


def _read_part(file: OpenFile, name: str, part: Part) -> torch.Tensor:
    if part.of == 1:
        return file.read(name)
    rows = file.shape(name)[0] // part.of
    return torch.cat([file.read(name, rows, piece * rows) for piece in part.pieces])


def fingerprint_of(
    architecture: Architecture,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
) -> str:
    """`Weights.fingerprint` of tensors by diffusers' names; `read` is only asked for vectors.

    Rounded to bf16, so that a model keeps its fingerprint in every precision it is published in.
    """
    digest = hashlib.sha256(architecture.name.encode())
    for key in sorted(shapes):
        digest.update(f"{key}{shapes[key]}".encode())
        if len(shapes[key]) == 1:
            digest.update(read(key).bfloat16().float().numpy().tobytes())
    return digest.hexdigest()


def expected_shapes(architecture: Architecture, config: dict) -> Shapes:
    """Every tensor of the full model by diffusers' names, without building it."""
    shapes = outer_shapes(architecture, config)
    for index in range(architecture.num_blocks(config)):
        prefix = architecture.block_prefix(config, index)
        block = block_shapes(architecture, config, index)
        shapes |= {prefix + name: shape for name, shape in block.items()}
    return shapes


def full_parameters(architecture: Architecture, config: dict) -> int:
    """Parameters of the full model, without building it. Tables that training never moves (buffers)
    do not count."""
    return number_of_values(expected_shapes(architecture, config), tables=False)


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def stored_count(module: nn.Module) -> int:
    """The values that a file of it holds: its parameters, and tables that training never moves
    (buffers)."""
    return sum(tensor.numel() for tensor in module.state_dict().values())
