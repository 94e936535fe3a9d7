"""LoRA files of every common kind and layout, read as changes of the full model's tensors by
diffusers' names and the teacher's numbers.

diffusers' own converters know low-rank pairs only, are written model by model, and drop what they do
not know; ComfyUI's are inside the host. Here one table of names serves every architecture, since
`Architecture.to_comfyui` already says which rows of a fused map belong to which tensor.

As in ComfyUI, a pair without an alpha has the scale 1, whatever the file's metadata say of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..architectures import Architecture, Part
from ..system.json_text import shown
from ..system.tensor_files import TensorFile
from .lora_kinds import NORMS, OF_WEIGHT, LowRank, change_of, kind_of, low_rank
from .lora_names import ModuleNames, Target, field_of

ReadTensor = Callable[[str], torch.Tensor]
"""reads a tensor of a model by diffusers' name"""


@dataclass(frozen=True)
class Module:
    """What a LoRA file says of one module."""

    name: str
    """in the file"""
    kind: str
    """one of `KINDS`"""
    target: Target
    """what it changes"""
    fields: dict[str, str]
    """which part of the change -> the tensor in the file"""

    @property
    def reads_base(self) -> bool:
        """Whether the change depends on the weight that it changes."""
        return self.kind in OF_WEIGHT or not NORMS.isdisjoint(self.fields)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the weight as a matrix"""
        return self.target.shape[0], math.prod(self.target.shape[1:])


class LoraFile:
    """A LoRA file, opened for a full model; tensors are read when they are asked for.

    Attributes: path; modules; unknown, the names of those that the model does not have. Raises
    ValueError, naming file and module, for a file that is not a LoRA, that changes nothing of this
    architecture, whose sizes are another model's, or that lacks parts of a change.
    """

    def __init__(self, path: Path, architecture: Architecture, config: dict):
        self.path, self._file = Path(path), TensorFile(path)
        names = ModuleNames(architecture, config)
        self._shapes = names.shapes
        modules, unknown = self._placed(*self._fields(architecture), names)
        self.modules: tuple[Module, ...] = tuple(modules)
        self.unknown: tuple[str, ...] = tuple(unknown)
        if not modules:
            raise ValueError(
                f"{path} changes nothing that {architecture.name} has; it has, for example, "
                f"{shown(unknown[0])}: give a LoRA of this architecture"
            )
        self._by_key: dict[str, list[Module]] = {}
        for module in modules:
            self._check_shape(module)
            for key in module.target.parts:
                self._by_key.setdefault(key, []).append(module)
        self._check_once()

    @property
    def targets(self) -> tuple[str, ...]:
        """The tensors that it changes, by diffusers' names."""
        return tuple(self._by_key)

    @property
    def metadata(self) -> dict[str, str]:
        return self._file.metadata

    def tensors_without(self, dropped: Iterable[Module]) -> dict[str, torch.Tensor]:
        """All tensors of the file as they are, those of unknown names included, without those of some
        modules."""
        gone = {tensor for module in dropped for tensor in module.fields.values()}
        return {name: self._file.read(name) for name in self._file.keys() if name not in gone}

    def reads_base(self, key: str) -> bool:
        """Whether the change of this tensor depends on the tensor itself."""
        return any(module.reads_base for module in self._by_key.get(key, []))

    def low_rank(self, key: str) -> list[LowRank] | None:
        """A tensor's change as the pairs whose sum it is: none where it is not changed, None where a
        part of its change has no such form (LoHa, LoKr, DoRA, full differences)."""
        modules = self._by_key.get(key, [])
        if any(module.kind != "lora" or module.reads_base for module in modules):
            return None
        return [self._pair(module, key) for module in modules]

    def change(
        self, key: str, strength: float = 1.0, base: ReadTensor | None = None
    ) -> torch.Tensor | None:
        """What is added to a tensor, float32, in the tensor's shape; None where it is not changed.

        base: reads a tensor of the model; needed where `reads_base`.
        """
        total = None
        for module in self._by_key.get(key, []):
            added = self._added(module, key, strength, base)
            total = added if total is None else total + added
        return None if total is None else total.reshape(self._shapes[key])

    def _fields(self, architecture: Architecture) -> tuple[dict[str, dict[str, str]], list[str]]:
        """(module's name -> its fields -> tensors in the file, other tensors)."""
        fields: dict[str, dict[str, str]] = {}
        other = []
        for tensor in self._file.keys():
            found = field_of(architecture, tensor)
            if found is None:
                other.append(tensor)
                continue
            module, field = found
            if field in fields.setdefault(module, {}):
                raise ValueError(f"{self.path} has two tensors for {field} of {shown(module)}")
            fields[module][field] = tensor
        if not fields:
            first = ", ".join(shown(name) for name in other[:3]) or "none"
            raise ValueError(
                f"{self.path} is not a LoRA: none of its tensors is named like a part of one; its first: {first}"
            )
        return fields, other

    def _placed(
        self, fields: dict[str, dict[str, str]], other: list[str], names: ModuleNames
    ) -> tuple[list[Module], list[str]]:
        """(what the model has, names of what it does not have)."""
        modules, unknown = [], dict.fromkeys(other)
        for name, found in fields.items():
            target = names.target(name)
            if target is None:
                unknown[name] = None
                continue
            if found.keys() - {"alpha", "diff_b"}:
                modules.append(self._module(name, found, target))
            if "diff_b" in found:
                bias = target.bias(names.shapes)
                if bias is None:
                    unknown[found["diff_b"]] = None
                else:
                    modules.append(Module(name, "diff", bias, {"diff": found["diff_b"]}))
        return modules, list(unknown)

    def _module(self, name: str, fields: dict[str, str], target: Target) -> Module:
        """What the file says of a module's weight."""
        fields = {field: tensor for field, tensor in fields.items() if field != "diff_b"}
        kind = kind_of(set(fields))
        if kind is None:
            raise ValueError(
                f"{self.path}: {shown(name)} has {', '.join(sorted(fields))}, which is not one whole change; "
                "download or train it again"
            )
        return Module(name, kind, target, fields)

    def _check_shape(self, module: Module) -> None:
        """Raises ValueError for a change whose parts do not fit each other, or what it changes."""
        shapes = {field: self._file.shape(tensor) for field, tensor in module.fields.items()}
        scalar = math.prod(shapes.pop("alpha", ()))
        with torch.device("meta"):
            tensors = {field: torch.empty(shape) for field, shape in shapes.items()}
            try:
                change = change_of(module.kind, tensors, torch.empty(module.matrix), 1.0)
            except (RuntimeError, IndexError):  # torch's, for sizes that do not fit
                change = torch.empty(0)
        if scalar != 1 or tuple(change.shape) != module.matrix:
            rows, columns = module.matrix
            raise ValueError(
                f"{self.path}: {shown(module.name)} does not fit the model's, which is {rows} x {columns}; "
                "it is a LoRA of another model, or damaged"
            )

    def _check_once(self) -> None:
        """Raises ValueError where two modules of the file are the same one by two names."""
        seen: dict[tuple, Module] = {}
        for module in self.modules:
            whole = (tuple(module.target.parts), module.kind)
            if (other := seen.setdefault(whole, module)) is not module:
                raise ValueError(
                    f"{self.path} has {shown(other.name)} and {shown(module.name)}, which are the same module; remove one"
                )

    def _tensors(self, module: Module) -> dict[str, torch.Tensor]:
        return {f: self._file.read(t).to(torch.float32) for f, t in module.fields.items()}

    def _pair(self, module: Module, key: str) -> LowRank:
        """The pair of one tensor, of a fused map its own rows."""
        pair = low_rank(self._tensors(module))
        return replace(pair, up=_rows(pair.up, module.target.parts[key]))

    def _added(
        self, module: Module, key: str, strength: float, base: ReadTensor | None
    ) -> torch.Tensor:
        if module.kind == "lora" and not module.reads_base:  # only its own rows of a fused map
            pair = self._pair(module, key)
            return replace(pair, scale=strength * pair.scale).matrix()
        weight = torch.empty(module.matrix, device="meta")
        if module.reads_base:
            assert base is not None, f"{module.name}: {module.kind} reads the weight it changes"
            weight = _whole(module.target, base).to(torch.float32).reshape(module.matrix)
        change = change_of(module.kind, self._tensors(module), weight, strength)
        return _rows(change, module.target.parts[key])


def _rows(whole: torch.Tensor, part: Part) -> torch.Tensor:
    """The rows of a fused map that are one tensor's."""
    if part.of == 1:
        return whole
    pieces = whole.chunk(part.of)
    return torch.cat([pieces[piece] for piece in part.pieces])


def _whole(target: Target, base: ReadTensor) -> torch.Tensor:
    """The fused map of a model's tensors."""
    pieces: dict[int, torch.Tensor] = {}
    for key, part in target.parts.items():
        pieces |= zip(part.pieces, base(key).chunk(len(part.pieces)), strict=True)
    return torch.cat([pieces[n] for n in sorted(pieces)]) if len(pieces) > 1 else pieces[0]
