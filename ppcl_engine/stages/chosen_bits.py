"""Formats of an exported file's matrices: chosen by their damage under a budget of bytes, alone or together
with the intervals that are replaced; and weights that make up for rounding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ..algorithms.few_bits.choice import Choice, Part, choose
from ..algorithms.few_bits.measuring import BitDamages, Damages, Walk, refitted_blocks
from ..algorithms.few_bits.rounding import Layers, Matrix
from ..algorithms.few_bits.saved import SavedDamages
from ..algorithms.sparsity.source import SparsitySource
from ..architectures.folded import FOLDING
from ..architectures.linear_maps import linear_maps
from ..models.assembly import placed_block
from ..models.layout import Place, layout_of, projections_of
from ..models.stock_files import Contents
from ..models.storing import (
    CHOICES,
    MIXED,
    fitting_stores,
    is_block_matrix,
    stored_entries,
    stored_size,
)
from ..models.streaming import StateStore, room_for_states
from ..models.tensor_sources import Source
from ..models.variant_sources import variant_sources
from ..models.weights import Weights
from ..plan import FULL, Interval, PruningPlan, Variant
from ..settings.convert_settings import ExportConfig
from ..system.gguf_files import gguf_header_size, gguf_size
from ..system.json_text import json_text
from ..system.machine import DTYPES, resolve_device
from ..system.tensor_files import OneAtATime, TensorEntry, file_mark, header_size
from .exported import contents_of
from .inputs import open_calibration
from .run_students import RunStudents

AUTO = "auto"
"""`--variant` for intervals that are chosen with the bits"""
REST = "bfloat16"
"""how `mixed` stores everything that it does not choose a format for"""


@dataclass(frozen=True)
class Bits:
    """How the matrices of a variant are stored."""

    variant: Variant
    stores: Mapping[tuple[str, Layers], str]
    """(place's name, layers of a matrix) -> its format"""
    damage: float = 0.0
    """predicted, of the velocity"""

    def to_json(self) -> dict:
        stores = {f"{p}: {', '.join(layers)}": store for (p, layers), store in self.stores.items()}
        return {
            "variant": self.variant.name,
            "intervals": list(self.variant.intervals),
            "predicted_damage": self.damage,
            "matrices": dict(Counter(self.stores.values()).most_common()),
            "stores": stores,
        }


@dataclass(frozen=True, eq=False)
class BitChooser:
    """What an export with chosen formats has in common."""

    config: ExportConfig
    weights: Weights
    students: RunStudents
    plan: PruningPlan

    def bits(self) -> Bits:
        """Raises ValueError for a budget below the smallest file, without a calibration set, and
        for a folded model."""
        if FOLDING in self.plan.config:
            raise ValueError(
                "the model is folded, and formats are chosen and refitted for plain models; unfold it first "
                "(ppcl fold --form off)"
            )
        if self.config.store != MIXED:
            variant = self.plan.variant(self.config.variant)
            return Bits(variant, self._one_store(variant))
        if self.config.variant == AUTO:
            return self._with_intervals()
        variant = self.plan.variant(self.config.variant)
        contents = self.contents(variant)
        parts, outside = self._parts(variant, contents)
        fixed = outside + self._header(contents)
        chosen = self._choice(variant, parts, [], fixed)
        return Bits(variant, chosen.stores, chosen.damage)

    def contents(self, variant: Variant, tensors: dict[str, Source] | None = None) -> Contents:
        if tensors is None:
            tensors = variant_sources(self.students, self.weights, self.plan, variant)
        return contents_of(self.config.layout, self.weights, self.plan, variant, tensors)

    def names(self, bits: Bits, contents: Contents) -> dict[str, str]:
        """name in the file -> its format"""
        prefixes = self._prefixes(bits.variant)
        held = {name: _held(source, prefixes) for name, source in contents.sources.items()}
        keys = {name: (place.name, layers) for name, (place, layers) in _known(held)}
        return {name: bits.stores[key] for name, key in keys.items() if key in bits.stores}

    def refitted(self, bits: Bits) -> dict[str, Source]:
        """The variant's tensors in the order of its blocks; the matrices' weights make up for the
        rounding of others."""
        tensors = variant_sources(self.students, self.weights, self.plan, bits.variant)
        prefixes, walk = self._prefixes(bits.variant), self._walk(bits.variant)
        order = {place: number for number, place in enumerate(prefixes.values())}
        held = {key: _held(source, prefixes) for key, source in tensors.items()}
        chosen: dict[Place, dict[Layers, str]] = {place: {} for place in order}
        for place in order:
            for (name, layers), store in bits.stores.items():
                if name == place.name:
                    chosen[place][layers] = store
        read = OneAtATime(_InOrder(refitted_blocks(walk, chosen)))
        fitted = {(p, layer) for p, by in chosen.items() for layers in by for layer in layers}
        for key, (place, (layer,)) in _known(held):
            if key.endswith(".weight") and (place, layer) in fitted:
                tensors[key] = replace(tensors[key], read=partial(read, place, layer))
        first = len(order)

        def position(key: str) -> int:
            found = held[key]
            return first if found is None else order[found[0]]

        return {key: tensors[key] for key in sorted(tensors, key=position)}

    def _one_store(self, variant: Variant) -> dict[tuple[str, Layers], str]:
        contents, prefixes = self.contents(variant), self._prefixes(variant)
        matrices = {
            name: _held(source, prefixes)
            for name, source in contents.sources.items()
            if is_block_matrix(name, source.shape)
        }
        return {(p.name, layers): self.config.store for _, (p, layers) in _known(matrices)}

    def _with_intervals(self) -> Bits:
        """The plan's intervals by their damages; in a layout that knows no corrections, those without."""
        stock = self.config.layout != "ppcl"
        intervals = [i for i in self.plan.intervals if not stock or i.correction == "none"]
        if not self.plan.variants or any(i.score is None for i in intervals):
            raise ValueError(
                f"--variant {AUTO} chooses by the damages of intervals, which {self.students.run.plan} lacks; "
                "run variants first, or name a variant"
            )
        full = Variant(name=FULL)
        pruned = Variant(name=AUTO, intervals=tuple(i.name for i in intervals))
        whole, small = self.contents(full), self.contents(pruned)
        parts, outside = self._parts(full, whole)
        others, _ = self._parts(pruned, small)
        fixed = outside + max(self._header(whole), self._header(small)) + _texts(small)
        by_name = {part.place.name: part for part in others}
        students = [(interval, by_name[interval.name]) for interval in intervals]
        chosen = self._choice(full, parts, students, fixed)
        return Bits(replace(pruned, intervals=chosen.intervals), chosen.stores, chosen.damage)

    def _choice(
        self,
        variant: Variant,
        parts: list[Part],
        students: list[tuple[Interval, Part]],
        fixed: int,
    ) -> Choice:
        budget = int(self.config.budget_gb * 1e9)
        self._check_budget(
            choose(parts, students, _nothing(parts, students), budget - fixed), fixed
        )
        matrices = {part.place: part.matrices for part in (*parts, *(s for _, s in students))}
        damages = self._damages(variant, matrices)
        chosen = choose(parts, students, damages, budget - fixed)
        assert isinstance(chosen, Choice)  # checked before anything was measured
        return chosen

    def _damages(self, variant: Variant, matrices: dict[Place, Sequence[Matrix]]) -> Damages:
        """Measured, or those that an export with another budget has measured."""
        saved = SavedDamages(self.students.run.bits, self._settings(variant))
        damages = saved.read()
        wanted = {
            (place.name, matrix.layers) for place, some in matrices.items() for matrix in some
        }
        if not wanted <= damages.keys():
            damages = BitDamages(self._walk(variant), matrices, self.config.refit).measure()
            saved.write(damages)
        return damages

    def _settings(self, variant: Variant) -> str:
        """What decides the damages; saved with them and compared when they are used again."""
        run, config = self.students.run, self.config
        paths = [run.best(run.student(interval.name)) for interval in self.plan.intervals]
        paths += [
            run.best(run.projection(place, kind))
            for place, kind in projections_of(self.plan, variant)
        ]
        if variant.tuned:
            paths.append(run.tuned_variant(variant.name))
        values = {
            "calibration": open_calibration(config, self.weights).hash,
            "model": self.weights.fingerprint,
            "model_file": self._mark(),
            "formats": CHOICES[config.layout],
            "layout": config.layout,
            "refit": config.refit,
            "dtype": config.dtype,
            "variant": [variant.name if variant.tuned else "", variant.intervals, variant.sites],
            "parts": [file_mark(path) for path in paths if path.exists()],
        }
        return json_text(values, sort_keys=True)

    def _mark(self) -> list:
        """Which files the model is: its fingerprint is the same in all precisions."""
        path = Path(self.config.model)
        files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
        return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    def _check_budget(self, chosen: Choice | int, fixed: int) -> None:
        if isinstance(chosen, int):
            smallest = -(-(chosen + fixed) // 1000) / 1e6
            raise ValueError(
                f"--budget-gb {self.config.budget_gb:g} is too small: the smallest file of these formats has "
                f"{smallest:.6f} GB; give that or more, or a smaller variant"
            )

    def _parts(self, variant: Variant, contents: Contents) -> tuple[list[Part], int]:
        """What is chosen in each place, and the bytes of all that is outside of blocks."""
        layout, prefixes = self.config.layout, self._prefixes(variant)
        places, source = list(prefixes.values()), self._source(variant)
        maps = {place: set(linear_maps(source.empty_block(place))) for place in places}
        matrices: dict[Place, list[Matrix]] = {place: [] for place in places}
        rest, outside = Counter(), sum(_extra_size(layout, t) for t in contents.extra.values())
        for name, tensor in contents.sources.items():
            held, size = _held(tensor, prefixes), partial(stored_size, layout, name, tensor.shape)
            if held is None:
                outside += size(REST)
            elif is_block_matrix(name, tensor.shape) and maps[held[0]].issuperset(held[1]):
                sizes = {store: size(store) for store in fitting_stores(layout, tensor.shape)}
                matrices[held[0]].append(Matrix(held[1], sizes))
            else:
                rest[held[0]] += size(REST)
        return [Part(place=p, matrices=matrices[p], rest=rest[p]) for p in places], outside

    def _header(self, contents: Contents) -> int:
        """The most that a file's header takes, whatever is chosen."""
        if self.config.layout == "gguf":
            return gguf_header_size([*contents.sources, *contents.extra], contents.metadata)
        entries = [
            TensorEntry(n, t.dtype, tuple(t.shape), _unread) for n, t in contents.extra.items()
        ]
        for name, tensor in contents.sources.items():
            stores = [REST]
            if is_block_matrix(name, tensor.shape):
                stores = fitting_stores(self.config.layout, tensor.shape)
            ways = [stored_entries(name, tensor.shape, _unread, store) for store in stores]
            entries += max(ways, key=len)
        return header_size(entries, contents.metadata)

    def _walk(self, variant: Variant) -> Walk:
        config = self.config
        inputs = open_calibration(config, self.weights).all_inputs()
        folder = self.students.run.states / f"export_{config.name}"
        store = StateStore(folder if config.streamed else None, room=room_for_states())
        device, dtype = resolve_device(config.device), DTYPES[config.dtype]
        return Walk(self._source(variant), inputs, store, dtype, device)

    def _source(self, variant: Variant) -> SparsitySource:
        weights, plan = self.weights, self.plan
        read, placed = weights.read, partial(placed_block, weights, self.students)
        if variant.tuned:
            read, placed = partial(self.students.tuned, variant.name), None
        return SparsitySource(
            self.config.model,
            weights.architecture,
            weights.config,
            layout_of(plan, variant),
            weights.fingerprint,
            read,
            plan,
            variant,
            placed,
        )

    def _prefixes(self, variant: Variant) -> dict[str, Place]:
        """Beginnings of the names of each place's tensors, with the teacher's indices."""
        prefix = partial(self.weights.architecture.block_prefix, self.weights.config)
        return {prefix(place.index): place for place in layout_of(self.plan, variant).places}


def _held(source: Source, prefixes: Mapping[str, Place]) -> tuple[Place, Layers] | None:
    """Whose tensor it is, and of which layers its rows are; None outside of blocks."""
    for prefix, place in prefixes.items():
        if source.of and source.of[0].startswith(prefix):
            names = (key.removeprefix(prefix).removesuffix(".weight") for key in source.of)
            return place, tuple(names)
    return None


def _known(held: Mapping[str, tuple[Place, Layers] | None]) -> Iterator:
    """The ones that are in a block."""
    return ((name, found) for name, found in held.items() if found is not None)


def _nothing(parts: list[Part], students: list[tuple[Interval, Part]]) -> dict:
    """Damages of nothing, for the smallest size alone."""
    every = (*parts, *(part for _, part in students))
    return {
        (p.place.name, m.layers): dict.fromkeys(m.sizes, 0.0) for p in every for m in p.matrices
    }


def _extra_size(layout: str, tensor: torch.Tensor) -> int:
    if layout != "gguf":
        return tensor.nbytes
    return gguf_size("F16" if tensor.dtype is torch.uint8 else "F32", tuple(tensor.shape))


def _texts(contents: Contents) -> int:
    """Bytes of what describes the variant: of the full model's there may be less."""
    return sum(2 * tensor.numel() for tensor in contents.extra.values())


def _unread() -> torch.Tensor:
    raise AssertionError("only sizes are asked for")


class _InOrder:
    """The blocks of a walk by their places, asked for in the walk's order."""

    def __init__(self, blocks: Iterator[tuple[Place, dict[str, torch.Tensor]]]):
        self.blocks = blocks

    def __call__(self, place: Place) -> dict[str, torch.Tensor]:
        return next(weights for found, weights in self.blocks if found == place)
