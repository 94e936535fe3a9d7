"""LoRAs merged into a model: what is added to each of its tensors.

Every change is computed on the model's own weights, not on what another LoRA made of them, and the
changes are added up in one order whatever order they are given in. So the result does not depend on
it; of several DoRAs on one map it is not ComfyUI's, which computes each on the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..architectures.projections import left_of, spread_out
from ..settings.convert_settings import MergeConfig
from .lora import Coverage, coverage
from .lora_files import LoraFile
from .merge_sources import MergeSource, open_merge_source
from .stock_files import refuse_what_stock_lacks
from .storing import check_store
from .tensor_sources import Source
from .weights import expected_shapes


@dataclass(frozen=True, eq=False)
class MergedLora:
    """A LoRA, how strongly it is merged, and what of it the model has a place for."""

    file: LoraFile
    strength: float
    coverage: Coverage

    @property
    def line(self) -> str:
        """ "a.safetensors at 0.8: covers 15 of 24 modules; 9 belong to removed blocks; ..." """
        return f"{self.file.path.name} at {self.strength:g}: {self.coverage.line()}"


def open_merge(config: MergeConfig) -> tuple[MergeSource, list[MergedLora]]:
    """The model and the LoRAs, all that can be wrong with them checked."""
    for path, _ in config.loras:
        if not path.is_file():
            raise ValueError(f"--lora {path}: no such file; give a LoRA file as FILE:STRENGTH")
    model = open_merge_source(config.path, config.base, config.variant)
    layout = layout_for(config, model)
    check_store(layout, config.store)
    if layout == "ppcl" and model.plan is None:
        raise ValueError(
            f"{config.path} carries no plan, which --layout ppcl needs; use --layout comfyui, diffusers or gguf"
        )
    if layout != "ppcl" and model.plan is not None and model.variant is not None:
        refuse_what_stock_lacks(model.plan, model.variant, layout)
    files = [
        (LoraFile(path, model.architecture, model.config), strength)
        for path, strength in config.loras
    ]
    return model, [lora_for(model, file, strength) for file, strength in files]


def layout_for(config: MergeConfig, model: MergeSource) -> str:
    return model.kept_layout if config.layout == "same" else config.layout


def lora_for(model: MergeSource, file: LoraFile, strength: float) -> MergedLora:
    """Raises ValueError where nothing of the LoRA has a place in the model."""
    covered = coverage(model.architecture, model.config, file.targets, file.unknown, model.layout)
    covered = replace(covered, reached=tuple(k for k in covered.reached if k in model.sources))
    if not covered.reached:
        raise ValueError(
            f"{file.path} changes nothing that is left in {model.path}: {covered.line()}; "
            "give another LoRA, or a larger variant"
        )
    return MergedLora(file, strength, covered)


def merged(model: MergeSource, loras: Sequence[MergedLora]) -> dict[str, Source]:
    """The model's tensors with the LoRAs' changes; those that nothing changes are as they were."""
    merging = _Merging(model, loras)
    return {
        key: Source(source.shape, lambda key=key: merging.read(key))
        if merging.changes(key)
        else replace(source, unchanged=True)
        for key, source in model.sources.items()
    }


class _Merging:
    """Reads tensors with their changes."""

    def __init__(self, model: MergeSource, loras: Sequence[MergedLora]):
        self._sources = model.sources
        self._whole = expected_shapes(model.architecture, model.config)
        at_work = [lora for lora in loras if lora.strength]
        self._loras = sorted(at_work, key=lambda lora: (str(lora.file.path), lora.strength))
        self._reached = {id(lora): frozenset(lora.coverage.reached) for lora in at_work}
        self._left = frozenset().union(*self._reached.values())

    def changes(self, key: str) -> bool:
        return key in self._left

    def read(self, key: str) -> torch.Tensor:
        tensor = self._sources[key].read().to(torch.float32)
        added = torch.zeros_like(tensor)
        for lora in self._loras:
            if key in self._reached[id(lora)]:
                change = lora.file.change(key, lora.strength, self._base)
                assert change is not None, key
                added += left_of(change, tuple(tensor.shape))
        return tensor + added

    def _base(self, key: str) -> torch.Tensor:
        """The whole of a weight that a change is computed from; zero where it is not left."""
        if key not in self._left:
            return torch.zeros(self._whole[key])
        return spread_out(self._sources[key].read().to(torch.float32), self._whole[key])
