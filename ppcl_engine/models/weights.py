"""A full transformer's weights in any known layout, read tensor by tensor.

Read: a diffusers transformer folder (sharded or not, safetensors or pickled tensors), a diffusers
pipeline folder, a ComfyUI single file or checkpoint (bf16, fp16, fp8, scaled fp8).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..architectures import Architecture, Part, detect_architecture
from ..system.atomic import read_json
from ..system.json_text import json_text
from ..system.pickled_files import PickledFile
from ..system.tensor_files import TensorFile, check_exists

COMFYUI_PREFIX = "model.diffusion_model."
STRUCTURE_TENSOR = "ppcl_structure"
# JSON: which of the teacher's blocks a file has, where metadata does not reach
HINTS_TENSOR = "ppcl_hints"
LONGEST_TEXT = 10_000_000  # bytes of a plan in a tensor; that of 60 blocks has some ten thousand
TRAINING_PREFIX = "module."  # what a wrapper of distributed training left before every name
SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
IGNORED_SUFFIXES = (*SCALE_SUFFIXES, ".scale_input", ".input_scale", ".comfy_quant")


class Weights:
    """A transformer's tensors by diffusers' names, read one at a time.

    Attributes: path, architecture, config (diffusers' names), fingerprint. Raises ValueError for a
    file of no known architecture, with missing tensors, or with tensors that have no home.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        stored, config = open_layout(self.path)
        self.architecture: Architecture = detect_architecture(stored, self.path)
        self._tensors = _parts_of(self.architecture, stored)
        self._scales = {key: place for key, place in stored.items() if key.endswith(SCALE_SUFFIXES)}
        marks = [name for name in self.architecture.marks if name in stored]
        self.config: dict = config or self.architecture.infer_config(
            self.shape, [*self._tensors, *marks]
        )
        self._check_config()
        self._check_keys()

    @property
    def num_blocks(self) -> int:
        return self.architecture.num_blocks(self.config)

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        file, name, part = self._tensors[key]
        shape = file.shape(name)
        return shape if part.of == 1 else (shape[0] // part.of * len(part.pieces), *shape[1:])

    def read(self, key: str, dtype: torch.dtype | None = None, device: str = "cpu") -> torch.Tensor:
        """The tensor in `dtype` (default: as stored; scaled fp8 then becomes bf16). What becomes
        larger is moved first and cast on the device: half the bytes to move, and casting fp8 is
        slow on a CPU."""
        file, name, part = self._tensors[key]
        tensor = _read_part(file, name, part)
        if dtype is None or tensor.dtype.itemsize <= dtype.itemsize:
            tensor = tensor.to(device)
        for suffix in SCALE_SUFFIXES:
            scale = self._scales.get(part.name.removesuffix(".weight") + suffix)
            if scale is not None:
                tensor = (tensor.float() * scale[0].read(scale[1]).to(tensor.device).float()).to(
                    dtype or torch.bfloat16
                )
        return (tensor if dtype is None else tensor.to(dtype)).to(device)

    def module(self, module: nn.Module, prefix: str, dtype: torch.dtype, device: str) -> nn.Module:
        """Fills a module (of any device, also meta) with the tensors under `prefix`; eval, no
        gradients."""
        state = {name: self.read(prefix + name, dtype, device) for name in module.state_dict()}
        module.load_state_dict(state, assign=True)
        return module.eval().requires_grad_(False)

    def block(self, index: int, dtype: torch.dtype, device: str) -> nn.Module:
        with torch.device("meta"):
            empty = self.architecture.build_block(self.config, index)
        return self.module(empty, self.architecture.block_prefix(self.config, index), dtype, device)

    def outer(self, dtype: torch.dtype, device: str) -> nn.Module:
        return self.module(self.architecture.build_outer(self.config), "", dtype, device)

    @property
    def fingerprint(self) -> str:
        """Hash of all names and shapes and of the values of all vectors (biases, norms).

        Vectors are a millionth of the weights, so this reads kilobytes of a 40 GB model.
        """
        shapes = {key: self.shape(key) for key in self._tensors}
        return fingerprint_of(self.architecture, shapes, lambda key: self.read(key, torch.float32))

    def _check_config(self) -> None:
        lists = self.architecture.released.lists.values() if self.architecture.released else ()
        pruned = [name for name in lists if self.config.get(name)]
        if pruned:
            raise ValueError(
                f"{self.path} is width-pruned ({pruned[0]} in its config.json), so no full model is in it; "
                "`ppcl import` makes a bundle or a standalone of it"
            )

    def _check_keys(self) -> None:
        expected = expected_shapes(self.architecture, self.config)
        missing = sorted(set(expected) - set(self._tensors))
        unknown = sorted(set(self._tensors) - set(expected))
        wrong = [
            key for key in expected if key in self._tensors and self.shape(key) != expected[key]
        ]
        prefixes = [
            self.architecture.block_prefix(self.config, index) for index in range(self.num_blocks)
        ]
        gaps = [
            p.rstrip(".") for p in prefixes if not any(key.startswith(p) for key in self._tensors)
        ]
        if gaps:
            raise ValueError(
                f"{self.path} lacks {len(gaps)} of {len(prefixes)} blocks, first {gaps[0]}: a full model's blocks are "
                "numbered without gaps; export it again, or download it again"
            )
        if missing:
            raise ValueError(
                f"{self.path} lacks {len(missing)} tensors, first {missing[0]}; it is incomplete"
            )
        if unknown:
            raise ValueError(
                f"{self.path} has {len(unknown)} tensors with no home, first {unknown[0]}; is it another model?"
            )
        if wrong:
            raise ValueError(
                f"{self.path}: {wrong[0]} has shape {self.shape(wrong[0])}, not {expected[wrong[0]]}"
            )


def _parts_of(
    architecture: Architecture, stored: dict[str, tuple[TensorFile | PickledFile, str]]
) -> dict[str, tuple[TensorFile | PickledFile, str, Part]]:
    """diffusers' name -> file, name in it, which of its rows."""
    marks = ("scaled_fp8", STRUCTURE_TENSOR, HINTS_TENSOR, *architecture.marks)
    names = [name for name in stored if not name.endswith(IGNORED_SUFFIXES) and name not in marks]
    return {key: (*stored[part.name], part) for key, part in parts_in(architecture, names).items()}


def parts_in(architecture: Architecture, names: Iterable[str]) -> dict[str, Part]:
    """diffusers' name -> where it lies in tensors of these names, which are diffusers' or
    ComfyUI's."""
    keys = {key: name for name in names for key in architecture.from_comfyui(name)}
    return {
        key: Part(name) if key == name else replace(architecture.to_comfyui(key, keys), name=name)
        for key, name in keys.items()
    }


def usual_name(architecture: Architecture, name: str) -> str:
    """As ComfyUI's files have it, of a tensor's name that may be spelled otherwise (FLUX' norms by
    newer hosts)."""
    key = architecture.from_comfyui(name)[0]
    return name if key == name else architecture.to_comfyui(key, (key,)).name


def _read_part(file: TensorFile | PickledFile, name: str, part: Part) -> torch.Tensor:
    if part.of == 1:
        return file.read(name)
    rows = file.shape(name)[0] // part.of
    return torch.cat([file.read(name, rows, piece * rows) for piece in part.pieces])


def fingerprint_of(
    architecture: Architecture,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
) -> str:
    """`Weights.fingerprint` of tensors by diffusers' names; `read` is asked for vectors only.

    Rounded to bf16, so that a model keeps its fingerprint in every precision it is published in.
    """
    digest = hashlib.sha256(architecture.name.encode())
    for key in sorted(shapes):
        digest.update(f"{key}{shapes[key]}".encode())
        if len(shapes[key]) == 1:
            digest.update(read(key).bfloat16().float().numpy().tobytes())
    return digest.hexdigest()


def expected_shapes(architecture: Architecture, config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of the full model, by diffusers' names, counted without memory."""
    with torch.device("meta"):
        shapes = {
            name: tuple(t.shape)
            for name, t in architecture.build_outer(config).state_dict().items()
        }
        for index in range(architecture.num_blocks(config)):
            prefix = architecture.block_prefix(config, index)
            block = architecture.build_block(config, index)
            shapes |= {prefix + name: tuple(t.shape) for name, t in block.state_dict().items()}
    return shapes


def full_parameters(architecture: Architecture, config: dict) -> int:
    """Of the full model, counted without memory. A table that no training moves (a buffer) is
    none."""
    with torch.device("meta"):
        blocks = [
            architecture.build_block(config, index)
            for index in range(architecture.num_blocks(config))
        ]
        return sum(map(parameter_count, (architecture.build_outer(config), *blocks)))


def open_layout(path: Path) -> tuple[dict[str, tuple[TensorFile | PickledFile, str]], dict | None]:
    """(key -> (file, name in it), configuration or None). Strips the prefixes of checkpoints and of
    training."""
    check_exists(path)
    if path.is_dir():
        return _open_folder(transformer_folder(path))
    file = TensorFile(path)
    names = file.keys()
    if any(name.startswith(COMFYUI_PREFIX) for name in names):
        names = [name for name in names if name.startswith(COMFYUI_PREFIX)]
    stored = {name.removeprefix(COMFYUI_PREFIX): (file, name) for name in names}
    return stored, _own_config(file) or hints_in(stored).get("config")


def _own_config(file: TensorFile) -> dict | None:
    """In a file's metadata, by diffusers' names. Other tools keep what they please under that
    name."""
    try:
        config = json.loads(file.metadata.get("config", "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file.path}: the configuration in its metadata is not JSON ({error}); export it again"
        ) from None
    return _checked_config(config, file.path) if config is not None else None


def _checked_config(config: object, path: Path) -> dict:
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a configuration is a JSON object; export or download it again")
    return config


def hints_in(stored: Mapping[str, tuple[TensorFile | PickledFile, str]]) -> dict:
    """What a file says of itself in a tensor: config, indices (of the teacher's blocks that it
    has), blocks (of the teacher). Empty where it says nothing."""
    if HINTS_TENSOR not in stored:
        return {}
    file, name = stored[HINTS_TENSOR]
    return object_in(file.read(name), file.path)


def text_in(tensor: torch.Tensor) -> str:
    """A byte a value. GGUF has no bytes: tools that make it of our files keep them as numbers of
    half precision, exactly. Raises ValueError for a tensor that holds no text."""
    kept = tensor.dtype in (torch.uint8, torch.float16, torch.float32)
    if not kept or len(tensor.shape) != 1 or tensor.shape[0] > LONGEST_TEXT:
        raise ValueError(f"a text is stored as bytes in a row, at most {LONGEST_TEXT:,}")
    try:
        return bytes(map(int, tensor.tolist())).decode()
    except OverflowError:  # an infinite number
        raise ValueError("a text is stored as bytes") from None


def object_in(tensor: torch.Tensor, where: object) -> dict:
    """A JSON object that is stored as bytes. Raises ValueError, in one line, for a tensor that
    holds none."""
    try:
        found = json.loads(text_in(tensor))
    except (ValueError, RecursionError):  # neither text nor JSON, or nested too deep
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"{where}: what it says of its own blocks is not readable; export or save it again"
        )
    return found


def as_tensor(value: dict | str) -> torch.Tensor:
    """A JSON object, or its text, as a tensor: what hosts keep of a file where they drop
    metadata."""
    return torch.tensor(
        list((value if isinstance(value, str) else json_text(value)).encode()), dtype=torch.uint8
    )


def transformer_folder(path: Path) -> Path:
    """Of a diffusers pipeline folder, or the folder itself."""
    return path / "transformer" if (path / "model_index.json").exists() else path


def _open_folder(path: Path) -> tuple[dict[str, tuple[TensorFile | PickledFile, str]], dict]:
    if not (path / "config.json").exists():
        raise ValueError(
            f"{path} has no config.json; give a diffusers transformer or pipeline folder"
        )
    values = _checked_config(read_json(path / "config.json"), path / "config.json")
    config = {k: v for k, v in values.items() if not k.startswith("_")}
    files = [
        PickledFile(shard) if shard.suffix == ".bin" else TensorFile(shard)
        for shard in _shards(path)
    ]
    return {
        name.removeprefix(TRAINING_PREFIX): (file, name) for file in files for name in file.keys()
    }, config


def _shards(path: Path) -> list[Path]:
    """The files that hold a folder's tensors; safetensors where there are both kinds."""
    for ending in (".safetensors", ".bin"):
        for index in sorted(path.glob(f"*{ending}.index.json")):
            names = _shard_names(index)
            absent = [name for name in names if not (path / name).exists()]
            if absent:
                raise ValueError(
                    f"{path} lacks the shard {absent[0]} that {index.name} lists; download it again"
                )
            return [path / name for name in names]
        if shards := sorted(path.glob(f"*{ending}")):
            return shards
    raise ValueError(f"{path} has no .safetensors or .bin file; download its weights")


def _shard_names(index: Path) -> list[str]:
    match read_json(index):
        case {"weight_map": dict(places)} if all(isinstance(name, str) for name in places.values()):
            return sorted(set(places.values()))
    raise ValueError(f"{index} does not say which file holds which tensor; download it again")


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def stored_count(module: nn.Module) -> int:
    """Values that a file of it holds: its parameters, and tables that no training moves
    (buffers)."""
    return sum(tensor.numel() for tensor in module.state_dict().values())
