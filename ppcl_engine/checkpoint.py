"""What the files hold: a transformer's weights in any known layout, our bundle, our standalones.

Read: a diffusers transformer folder (sharded or not), a diffusers pipeline folder, a ComfyUI
single file or checkpoint (bf16, fp16, fp8, scaled fp8), a standalone of ours, a bundle + base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from .architectures import Architecture, architecture_named, detect_architecture
from .files import TensorEntry, TensorFile, read_json, write_tensor_stream
from .plan import Interval, PruningPlan, plan_from_json
from .surgery import PassThrough, build_student, filled_student, pruned_blocks

COMFYUI_PREFIX = "model.diffusion_model."
PLAN_KEY = "ppcl_plan"
MAP_KEY = "ppcl_block_map"
STRUCTURE_TENSOR = "ppcl_structure"
SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
IGNORED_SUFFIXES = (*SCALE_SUFFIXES, ".scale_input", ".input_scale", ".comfy_quant")
BUNDLE_SUFFIX = ".ppcl.safetensors"


class Weights:
    """A transformer's tensors by diffusers' names, read one at a time.

    Attributes: path, architecture, config (diffusers' names), fingerprint. Raises ValueError for a
    file of no known architecture, with missing tensors, or with tensors that have no home.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        stored, config = _open_layout(self.path)
        self.architecture: Architecture = detect_architecture(stored, self.path)
        self._tensors = {
            self.architecture.from_comfyui(key): place
            for key, place in stored.items()
            if not key.endswith(IGNORED_SUFFIXES) and key != "scaled_fp8"
        }
        self._scales = {key: place for key, place in stored.items() if key.endswith(SCALE_SUFFIXES)}
        self.config: dict = config or self.architecture.infer_config(self.shape, self._tensors)
        self._check_keys()

    @property
    def num_blocks(self) -> int:
        return self.architecture.num_blocks(self.config)

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        file, name = self._tensors[key]
        return file.shape(name)

    def read(self, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor in `dtype` (default: as stored; scaled fp8 then becomes bf16)."""
        file, name = self._tensors[key]
        tensor = file.read(name)
        for suffix in SCALE_SUFFIXES:
            scale = self._scales.get(key.removesuffix(".weight") + suffix)
            if scale is not None:
                tensor = (tensor.float() * scale[0].read(scale[1]).float()).to(dtype or torch.bfloat16)
        return tensor if dtype is None else tensor.to(dtype)

    def module(self, module: nn.Module, prefix: str, dtype: torch.dtype, device: str) -> nn.Module:
        """Fills a module (of any device, also meta) with the tensors under `prefix`; eval, no gradients."""
        state = {name: self.read(prefix + name, dtype).to(device) for name in module.state_dict()}
        module.load_state_dict(state, assign=True)
        return module.eval().requires_grad_(False)

    def block(self, index: int, dtype: torch.dtype, device: str) -> nn.Module:
        with torch.device("meta"):
            empty = self.architecture.build_block(self.config, index)
        return self.module(empty, self.architecture.block_prefix(index), dtype, device)

    def outer(self, dtype: torch.dtype, device: str) -> nn.Module:
        return self.module(self.architecture.build_outer(self.config), "", dtype, device)

    @property
    def fingerprint(self) -> str:
        """Hash of all names and shapes and of the values of all vectors (biases, norms).

        Vectors are a millionth of the weights, so this reads kilobytes of a 40 GB model.
        """
        digest = hashlib.sha256(self.architecture.name.encode())
        for key in sorted(self._tensors):
            shape = self.shape(key)
            digest.update(f"{key}{shape}".encode())
            if len(shape) == 1:
                digest.update(self.read(key, torch.float32).numpy().tobytes())
        return digest.hexdigest()

    def _check_keys(self) -> None:
        expected = expected_shapes(self.architecture, self.config)
        missing = sorted(set(expected) - set(self._tensors))
        unknown = sorted(set(self._tensors) - set(expected))
        wrong = [key for key in expected if key in self._tensors and self.shape(key) != expected[key]]
        if missing:
            raise ValueError(f"{self.path} lacks {len(missing)} tensors, first {missing[0]}; it is incomplete")
        if unknown:
            raise ValueError(
                f"{self.path} has {len(unknown)} tensors with no home, first {unknown[0]}; is it another model?"
            )
        if wrong:
            raise ValueError(f"{self.path}: {wrong[0]} has shape {self.shape(wrong[0])}, not {expected[wrong[0]]}")


def expected_shapes(architecture: Architecture, config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of the full model, by diffusers' names, counted without memory."""
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in architecture.build_outer(config).state_dict().items()}
        for index in range(architecture.num_blocks(config)):
            prefix = architecture.block_prefix(index)
            block = architecture.build_block(config, index)
            shapes |= {prefix + name: tuple(t.shape) for name, t in block.state_dict().items()}
    return shapes


def _open_layout(path: Path) -> tuple[dict[str, tuple[TensorFile, str]], dict | None]:
    """(key -> (file, name in it), configuration or None). Strips ComfyUI's checkpoint prefix."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a model file or folder")
    if path.is_dir():
        return _open_folder(path)
    file = TensorFile(path)
    names = file.keys()
    if any(name.startswith(COMFYUI_PREFIX) for name in names):
        names = [name for name in names if name.startswith(COMFYUI_PREFIX)]
    config = json.loads(file.metadata["config"]) if "config" in file.metadata else None
    return {name.removeprefix(COMFYUI_PREFIX): (file, name) for name in names}, config


def _open_folder(path: Path) -> tuple[dict[str, tuple[TensorFile, str]], dict]:
    if (path / "model_index.json").exists():
        path = path / "transformer"
    if not (path / "config.json").exists():
        raise ValueError(f"{path} has no config.json; give a diffusers transformer or pipeline folder")
    config = {k: v for k, v in read_json(path / "config.json").items() if not k.startswith("_")}
    indices = sorted(path.glob("*.safetensors.index.json"))
    if indices:
        names = sorted(set(read_json(indices[0])["weight_map"].values()))
        absent = [name for name in names if not (path / name).exists()]
        if absent:
            raise ValueError(f"{path} lacks the shard {absent[0]} that {indices[0].name} lists; download it again")
        shards = [path / name for name in names]
    else:
        shards = sorted(path.glob("*.safetensors"))
    if not shards:
        raise ValueError(f"{path} has no .safetensors file; pickled weights are not read")
    files = [TensorFile(shard) for shard in shards]
    return {name: (file, name) for file in files for name in file.keys()}, config


class Bundle:
    """`*.ppcl.safetensors`: students only, keyed by teacher interval, with the plan in the metadata."""

    def __init__(self, path: Path):
        self.file = TensorFile(path)
        if PLAN_KEY not in self.file.metadata:
            raise ValueError(f"{path} holds no pruning plan, so it is not a PPCL bundle")
        self.plan: PruningPlan = plan_from_json(self.file.metadata[PLAN_KEY], path)
        self.architecture = architecture_named(self.plan.architecture)

    def student(self, interval: Interval, dtype: torch.dtype, device: str) -> nn.Module:
        prefix = student_prefix(interval)
        names = [key.removeprefix(prefix) for key in self.file.keys() if key.startswith(prefix)]
        state = {name: self.file.read(prefix + name).to(device, dtype) for name in names}
        return filled_student(self.architecture, self.plan.config, interval, state)


def student_prefix(interval: Interval) -> str:
    return f"students.{interval.name}."


def write_bundle(
    path: Path, plan: PruningPlan, student: Callable[[Interval], dict[str, torch.Tensor]], dtype: torch.dtype
) -> None:
    """`student(interval)` gives its state dict, once an interval; memory holds one student at a time."""
    entries, latest = [], {}

    def read(interval: Interval, name: str) -> torch.Tensor:
        if interval.name not in latest:
            latest.clear()
            latest[interval.name] = student(interval)
        return latest[interval.name][name]

    architecture = architecture_named(plan.architecture)
    for interval in plan.intervals:
        with torch.device("meta"):
            shapes = build_student(architecture, plan.config, interval).state_dict()
        for name, tensor in shapes.items():
            key = student_prefix(interval) + name
            entries.append(TensorEntry(key, dtype, tuple(tensor.shape), lambda i=interval, n=name: read(i, n)))
    write_tensor_stream(path, entries, {PLAN_KEY: plan.to_json(), "format": "pt"})


def is_bundle(path: Path) -> bool:
    return Path(path).is_file() and PLAN_KEY in TensorFile(path).metadata


class Students(Protocol):
    """Where trained students come from: a bundle, or a run folder."""

    def student(self, interval: Interval, dtype: torch.dtype, device: str) -> nn.Module: ...


def assemble(
    weights: Weights,
    students: Students | None,
    intervals: Sequence[Interval],
    dtype: torch.dtype,
    device: str,
    teacher_block: Callable[[int], nn.Module] | None = None,
) -> nn.Module:
    """diffusers' model with the intervals replaced, teacher indices kept. `teacher_block` (default: read into
    memory) gives the blocks that stay."""
    blocks = pruned_blocks(
        weights.architecture,
        weights.num_blocks,
        intervals,
        teacher_block or (lambda index: weights.block(index, dtype, device)),
        lambda interval: students.student(interval, dtype, device),
    )
    return weights.architecture.assemble(weights.outer(dtype, device), weights.config, blocks)


def open_model(
    path: str | Path,
    variant: str | None = None,
    base: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> nn.Module:
    """A model with the same forward as diffusers' class of its architecture.

    path: a bundle (then `base` is the teacher it was made from), a standalone file or folder of
    ours, a diffusers folder, a ComfyUI single file. variant: a name of the bundle's plan, "full",
    or intervals as "3-4,8-10"; None is the smallest. Raises ValueError in one line.
    """
    path = Path(path)
    if not is_bundle(path):
        if variant is not None:
            raise ValueError(f"{path} is not a bundle, so it has no variant {variant!r}; leave the variant out")
        structure = standalone_structure(path)
        return (
            _open_standalone(path, structure, dtype, device)
            if structure
            else assemble(Weights(path), None, (), dtype, device)
        )
    if base is None:
        raise ValueError(f"{path} is a bundle: students only; give the base model it was made from as well")
    bundle, weights = Bundle(path), Weights(base)
    bundle.plan.check_teacher(weights.architecture.name, weights.fingerprint, base)
    return assemble(weights, bundle, bundle.plan.intervals_of(bundle.plan.variant(variant)), dtype, device)


def architecture_of(path: Path) -> Architecture:
    """Of any file that `open_model` reads."""
    if is_bundle(path):
        return Bundle(path).architecture
    structure = standalone_structure(path)
    return architecture_named(structure["architecture"]) if structure else Weights(path).architecture


def standalone_structure(path: Path) -> dict | None:
    """The structure tensor's content when `path` is a standalone in our own (non-stock) layout."""
    if not path.is_file():
        return None
    file = TensorFile(path)
    if STRUCTURE_TENSOR not in file.entries:
        return None
    return json.loads(bytes(file.read(STRUCTURE_TENSOR).tolist()))


def _open_standalone(path: Path, structure: dict, dtype: torch.dtype, device: str) -> nn.Module:
    file, plan = TensorFile(path), plan_from_json(json.dumps(structure), path)
    architecture = architecture_named(plan.architecture)
    with torch.device("meta"):
        blocks = pruned_blocks(
            architecture,
            plan.num_blocks,
            list(plan.intervals),
            lambda index: architecture.build_block(plan.config, index),
            lambda interval: build_student(architecture, plan.config, interval),
        )
    model = architecture.assemble(architecture.build_outer(plan.config), plan.config, blocks)
    state = {name: file.read(name).to(device, dtype) for name in model.state_dict()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def kept_blocks(blocks: list[nn.Module]) -> list[int]:
    """Teacher indices of the blocks that hold weights, in order."""
    return [index for index, block in enumerate(blocks) if not isinstance(block, PassThrough)]
