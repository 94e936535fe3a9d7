"""Merge: bake LoRAs into a model and write it as a file of its own, one tensor after the other."""

from __future__ import annotations

from pathlib import Path

from ...models.merge_sources import MergeSource
from ...models.merging import MergedLora, layout_for, merged, open_merge
from ...models.standalone import write_standalone
from ...models.stock_files import stock_contents, write_contents
from ...settings.convert_settings import MergeConfig
from ...system.gguf_files import GGUF_SUFFIX
from ...system.json_text import json_text

LORAS_KEY = "ppcl_loras"
ENDINGS = (".safetensors", GGUF_SUFFIX)


def merge(config: MergeConfig) -> Path:
    """Returns the file (or diffusers folder). Raises ValueError for a LoRA that is not one of this
    architecture or reaches nothing, and for what the layout or the precision cannot hold."""
    model, loras = open_merge(config)
    for lora in loras:
        print(lora.line)
    sources, metadata = merged(model, loras), _described(model, loras)
    layout = layout_for(config, model)
    path = config.run / "exports" / config.name
    _check_other_file(path, model)
    original = model.stored if layout == model.kept_layout else None
    if layout == "ppcl":
        assert model.plan is not None and model.variant is not None
        file = path.with_name(f"{path.name}.safetensors")
        return write_standalone(
            file, sources, model.plan, model.variant, config.store, metadata, original
        )
    contents = stock_contents(
        layout, model.architecture, model.config, model.indices, sources, metadata
    )
    return write_contents(path, layout, config.store, model.architecture, contents, original)


def _described(model: MergeSource, loras: list[MergedLora]) -> dict[str, str]:
    """What the file says of itself: the plan it comes from, and what was merged."""
    merged_files = [{"file": lora.file.path.name, "strength": lora.strength} for lora in loras]
    return {**model.metadata, LORAS_KEY: json_text(merged_files)}


def _check_other_file(path: Path, model: MergeSource) -> None:
    """Raises ValueError where the new file would take the place of the one that it is made from."""
    for written in (path, *(path.with_name(f"{path.name}{end}") for end in ENDINGS)):
        if written.exists() and written.samefile(model.path):
            raise ValueError(
                f"{model.path} would be replaced by its own merge; choose another --name"
            )
