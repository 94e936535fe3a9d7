"""Sparsify: set weights of the blocks to zero, one block after the other, by what its layers read after
the pruned blocks before it.

A pruned block is a file. An interrupted run goes on after the last one and computes the states before
the next block again from the files, so it ends in the same bits. Memory holds one block, its Gram
matrices and the states between two blocks.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from ...algorithms.block_states import BlockStates
from ...algorithms.sparsity.blocks import check_maps, prune_block, watch
from ...algorithms.sparsity.files import Sparsity, write_sparse
from ...algorithms.sparsity.grams import timestep_weights
from ...algorithms.sparsity.patterns import checked_sparsity, pattern_named
from ...algorithms.sparsity.pruning import RECONSTRUCTION, Method
from ...algorithms.sparsity.source import SparsitySource, open_source
from ...architectures import BlockState, SharedText, placed
from ...data.calibration import CalibrationSet, load_calibration
from ...models.layout import Place
from ...models.streaming import StateStore, room_for_states
from ...models.tensor_sources import Source
from ...run import Run
from ...settings.convert_settings import SparsifyConfig
from ...system.atomic import write_json
from ...system.finite import BAD_MODEL, check_finite
from ...system.json_text import json_text
from ...system.machine import DTYPES, resolve_device, return_freed_memory
from ...system.progress import Progress, measured, saved
from ...system.tensor_files import TensorFile, write_tensors

MACHINE_SETTINGS = ("run", "device", "streamed", "calibration", "dry_run")
"""settings that change no bit; of the calibration set, its hash is compared instead of its path"""


def sparsify(config: SparsifyConfig) -> Path:
    """Returns the file. Raises ValueError for a share that the pattern does not allow, for a calibration
    set of another model, and for a layer that no sample reaches."""
    pattern = pattern_named(config.pattern)
    method = Method(
        pattern=pattern,
        sparsity=checked_sparsity(config.sparsity, pattern),
        score=config.score,
        granularity=config.granularity,
        exchange=config.exchange,
        compensate=config.compensate,
    )
    source = open_source(config.path, config.base, config.variant)
    path = config.calibration or Run(config.run).calibration
    calibration = load_calibration(path)
    calibration.check_model(source.architecture.name, source.fingerprint, path)
    skip = tuple(config.skip.replace(",", " ").split())
    places = source.layout.places
    if not sum(
        check_maps(source.empty_block(place), method, skip, f"block {place.name}")
        for place in places
    ):
        raise ValueError(f"--skip {config.skip!r} leaves no linear map to prune; name fewer")
    with torch.no_grad():
        return _Sparsifying(config, method, skip, source, calibration).write()


@dataclass(eq=False)
class _Sparsifying:
    """One run of the stage."""

    config: SparsifyConfig
    method: Method
    skip: tuple[str, ...]
    """parts of the names of linear maps that stay dense"""
    source: SparsitySource
    calibration: CalibrationSet

    def __post_init__(self):
        self.device, self.dtype = resolve_device(self.config.device), DTYPES[self.config.dtype]
        run = Run(self.config.run)
        self.folder, self.states = (
            run.sparsified / self.config.name,
            run.states / f"sparsify_{self.config.name}",
        )
        self.shared: dict[int, SharedText] = {}

    def write(self) -> Path:
        self._prune()
        path = self.config.run / "exports" / f"{self.config.name}.safetensors"
        reports = [row for place in self.source.layout.places for row in self._report(place)]
        sparsity = self._described(reports)
        compressed = {f"{row['block_prefix']}{row['layer']}.weight" for row in reports}
        is_2_4 = self.config.pattern == "2:4"
        write_sparse(
            path,
            self.source,
            self._tensors(),
            compressed if is_2_4 else set(),
            DTYPES[self.config.store],
            sparsity,
        )
        write_json(path.with_suffix(".json"), {**json.loads(sparsity.to_json()), "layers": reports})
        shutil.rmtree(self.folder)
        share, size = sparsity.dropped / sparsity.weights, path.stat().st_size
        print(
            f"{sparsity.dropped:,} of {sparsity.weights:,} weights are zero ({100 * share:.2f} %), mean layer error "
            f"{sparsity.error:.4f}, {size:,} bytes"
        )
        return path

    def _prune(self) -> None:
        """Prunes the blocks that have no file yet; then every block has one."""
        embedded = self._embedded()
        weights = [
            timestep_weights(batch["timestep"], self.config.timesteps)
            for batch in self.calibration.batches
        ]
        store = StateStore(self.states if self.config.streamed else None, room=room_for_states())
        for batch, state in enumerate(embedded):
            store.put(0, batch, state)
        places = self.source.layout.places
        for number, place in enumerate(Progress(places, desc="sparsify", unit="block")):
            block = self.source.block(place, self.dtype, self.device, self.shared)
            states = BlockStates(store, number, embedded)
            if not self._is_done(place):
                self._prune_block(block, place, states, weights)
                self._tell(number, place)
            elif self.config.feed == "dense":
                self._advance(block, states)
            if self.config.feed == "pruned":
                self._fill(block, place)
                self._advance(block, states)
            states.drop()
            del block
            return_freed_memory()
        store.clear()

    def _tell(self, number: int, place: Place) -> None:
        for row in self._report(place):
            measured(f"layer {row['layer']}", number, row["error"])
        saved()

    def _embedded(self) -> list[BlockState]:
        outer, architecture = self.source.outer(self.dtype, self.device), self.source.architecture
        rows = self.calibration.all_inputs()
        return [
            architecture.embed(outer, placed(inputs, self.device, self.dtype)) for inputs in rows
        ]

    def _advance(self, block: nn.Module, states: BlockStates) -> None:
        for batch, state in states:
            states.put(batch, self.source.architecture.run_block(block, state))

    def _prune_block(
        self, block: nn.Module, place: Place, states: BlockStates, weights: list[torch.Tensor]
    ) -> None:
        check_finite(block.state_dict(), f"{self.config.path}, block {place.name}", BAD_MODEL)
        grams, architecture = (
            watch(self.source.architecture.name, block, self.skip),
            self.source.architecture,
        )
        for batch, state in states:
            with grams.watching(state, weights[batch]):
                after = architecture.run_block(block, state)
            if self.config.feed == "dense":
                states.put(batch, after)
        where = f"block {place.name}"
        reports = prune_block(
            architecture.name, block, grams, self.method, self.config.permute, where
        )
        prefix, store = self.source.prefix(place), DTYPES[self.config.store]
        rows = [
            {"block": place.name, "block_prefix": prefix, **report.to_json()} for report in reports
        ]
        state = {name: tensor.to("cpu", store) for name, tensor in block.state_dict().items()}
        write_tensors(
            self._path(place), state, {"settings": self._settings, "report": json_text(rows)}
        )

    def _fill(self, block: nn.Module, place: Place) -> None:
        """Loads the pruned weights of the block's file, in its precision."""
        file = TensorFile(self._path(place))
        state = {name: file.read(name).to(self.device, self.dtype) for name in block.state_dict()}
        block.load_state_dict(state, assign=True)

    def _path(self, place: Place) -> Path:
        return self.folder / f"block_{place.index:03d}.safetensors"

    def _is_done(self, place: Place) -> bool:
        path = self._path(place)
        return path.exists() and TensorFile(path).metadata.get("settings") == self._settings

    def _report(self, place: Place) -> list[dict]:
        return TensorFile(self._path(place)).about("report", list)

    @cached_property
    def _settings(self) -> str:
        config = self.config
        values = {
            f.name: str(getattr(config, f.name))
            for f in fields(config)
            if f.name not in MACHINE_SETTINGS
        }
        files = [file for path in (config.path, config.base) if path for file in _files(path)]
        marks = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return json_text([values, self.calibration.hash, self.source.fingerprint, marks])

    def _tensors(self) -> dict[str, Source]:
        """Every tensor by its name in diffusers: those outside of blocks unchanged, those of blocks from
        their files."""
        source = self.source
        tensors = {
            n: Source(shape, lambda n=n: source.read(n))
            for n, shape in source.outer_shapes().items()
        }
        for place in source.layout.places:
            file, prefix = TensorFile(self._path(place)), source.prefix(place)
            tensors |= {
                prefix + n: Source(file.shape(n), lambda f=file, n=n: f.read(n))
                for n in file.keys()
            }
        return tensors

    def _described(self, reports: list[dict]) -> Sparsity:
        config, method = self.config, self.method
        return Sparsity(
            pattern=method.pattern.name,
            sparsity=method.sparsity,
            score=method.score,
            granularity=method.pattern.name if method.pattern.is_structured else method.granularity,
            exchange=method.exchange,
            compensate=method.compensate or method.score == "obs",
            permuted=any(row["permuted"] for row in reports),
            timesteps=config.timesteps,
            calibration=self.calibration.hash,
            weights=sum(row["rows"] * row["columns"] for row in reports),
            dropped=sum(row["dropped"] for row in reports),
            error=sum(row["error"] for row in reports) / len(reports),
            note=f"the score is {RECONSTRUCTION}" if method.score == "energy" else "",
        )


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
