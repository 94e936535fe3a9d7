"""Words and pictures to the tensors a transformer reads, and back; `open_codec` chooses by the
files beside the transformer."""

from __future__ import annotations

from pathlib import Path

from ...system.atomic import read_object
from ...system.tensor_files import TensorFile, check_exists
from .base import Codec
from .flux1 import FluxCodec
from .pipeline import PipelineCodec
from .qwen_image import QwenImageCodec, QwenImageEditCodec, QwenImageEditPlusCodec
from .qwen_image_21 import QwenImage21Codec
from .sd35 import StableDiffusion3Codec
from .table import POSITIONS, TABLES, VOCABULARY_KEY, TableCodec, has_tables
from .z_image import ZImageCodec

PIPELINES = {
    "QwenImagePipeline": QwenImageCodec,
    "QwenImageEditPipeline": QwenImageEditCodec,
    "QwenImageEditPlusPipeline": QwenImageEditPlusCodec,
    "FluxPipeline": FluxCodec,
    "StableDiffusion3Pipeline": StableDiffusion3Codec,
    "ZImagePipeline": ZImageCodec,
    "QwenImage21Pipeline": QwenImage21Codec,
}


def open_pipeline(folder: Path, device: str = "cpu") -> PipelineCodec:
    """The codec of the pipeline that the folder's model_index.json names. Raises ValueError for an
    unknown one."""
    name = read_object(folder / "model_index.json").get("_class_name")
    if name not in PIPELINES:
        raise ValueError(
            f"{folder}/model_index.json names {name}; known pipelines: {', '.join(PIPELINES)}"
        )
    return PIPELINES[name](folder, device)


def open_codec(path: Path, device: str = "cpu") -> Codec:
    """The codec of a model. Raises ValueError for a model that has none, such as a transformer's
    file alone."""
    path = Path(path)
    check_exists(path)
    if path.is_dir() and (path / "model_index.json").exists():
        return open_pipeline(path, device)
    if path.is_file() and has_tables(path):
        file = TensorFile(path)
        if VOCABULARY_KEY in file.metadata:
            positions = file.read(POSITIONS).float() if POSITIONS in file.entries else None
            tables = (file.read(name).float() for name in TABLES)
            vocabulary = file.about(VOCABULARY_KEY, tuple[str, ...])
            return TableCodec(vocabulary, *tables, position_embedding=positions)
    raise ValueError(
        f"{path} has no text encoder and VAE; give a diffusers pipeline folder "
        "(calibrate also takes stored embeddings, with --embeddings)"
    )
