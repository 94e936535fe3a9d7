"""Fold: modulations that read the timestep alone become a table of their values or a map of a few
coefficients; or back.

The originals are read one at a time, in two passes of which the first measures or computes and the
second writes, so memory holds less than two blocks whatever the model's size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F

from ...architectures import architecture_named
from ...architectures.folded import FOLDING, PRECISIONS, Folding
from ...data.codecs import open_codec
from ...data.codecs.table import has_tables
from ...data.flow import euler_timesteps
from ...data.sampling import picture_size
from ...models.bundle import BUNDLE_SUFFIX, Bundle
from ...models.cost import CostModel
from ...models.folding.basis import Curve, TimeBasis, useful_ranks
from ...models.folding.reading import (
    Original,
    check_foldable,
    embedder_prefix,
    open_embedder,
    open_modulation,
    open_original,
)
from ...models.folding.tables import Table, batches_of, conditionings, make_table, rows_of
from ...models.folding.writing import Folded, write_folded, write_unfolded
from ...models.weights import Weights
from ...plan import PruningPlan
from ...report.folding_report import printed, size_of, write_report
from ...settings.convert_settings import FoldConfig, unused_settings
from ...system.distributed import tell
from ...system.machine import DTYPES, resolve_device, return_freed_memory
from ...system.progress import Progress

MOST_SAMPLES = 1024  # at once: as many rows go through the time embedder


def fold(config: FoldConfig) -> Path:
    """Returns the file; of a bundle its base's folded file is written beside it, as `<name>_base`.
    Raises ValueError for models that cannot be folded, a bound that no useful rank keeps, files
    that do not belong together."""
    for name, reason in unused_settings(config).items():
        tell(f"--{name} has no effect, since {reason}")
    original = open_original(config.path)
    folder = config.run / "exports"
    if config.form == "off":
        if config.base is None:
            raise ValueError("--form off needs --base, the file that was folded")
        return write_unfolded(
            _path(folder, config.name, original), original, open_original(config.base)
        )
    check_foldable(original.architecture, original.config, config.path)
    base = _base_of(original, config)
    return _Folding(config, original, base).write(folder)


def _path(folder: Path, name: str, original: Original) -> Path:
    return folder / f"{name}{BUNDLE_SUFFIX if original.is_bundle else '.safetensors'}"


def _precision(dtype: str, device: str) -> str:
    if dtype != "auto":
        return dtype
    return "bfloat16" if device.startswith("cuda") else "float32"


def _base_of(original: Original, config: FoldConfig) -> Original:
    """The full model that holds the time embedder. Raises ValueError for a bundle without its
    own."""
    if not original.is_bundle:
        return original
    if config.base is None:
        raise ValueError(
            f"{config.path} is a bundle: students only; give the full model it was made from as --base"
        )
    base = open_original(config.base)
    if not isinstance(base.model, Weights):
        raise ValueError(
            f"{config.base} is not a full model; give the one that {config.path} was made from as --base"
        )
    Bundle(config.path).check_base(base.model, config.base)
    check_foldable(base.architecture, base.config, config.base)
    return base


@dataclass(eq=False)
class _Folding:
    """One run on a file and, where it is a bundle, its base."""

    config: FoldConfig
    original: Original
    base: Original

    def __post_init__(self):
        self.architecture, self.device = self.base.architecture, resolve_device(self.config.device)
        self.precision = _precision(self.config.dtype, self.device)
        self.dtype = DTYPES[self.precision]
        self.files = list(dict.fromkeys((self.base, self.original)))

    def write(self, folder: Path) -> Path:
        make = self._table if self.config.form == "table" else self._basis
        folding, maps, report = make()
        base_path, path = (
            folder / f"{self.config.name}_base.safetensors",
            _path(folder, self.config.name, self.original),
        )
        if self.original.is_bundle and self.original.plan:
            write_folded(base_path, self.base, self._folded(self.base, folding, maps))
            fingerprint = Weights(base_path).fingerprint
            plan = _plan_of_folded(self.original.plan, folding, fingerprint)
            self.original = replace(self.original, plan=plan)
        write_folded(path, self.original, self._folded(self.original, folding, maps))
        written = [base_path, path] if self.original.is_bundle else [path]
        sizes = [
            size_of(file, file_path) for file, file_path in zip(self.files, written, strict=True)
        ]
        print(printed(write_report(self.config, sizes, report), sizes, report))
        return path

    def _folded(self, file: Original, folding: Folding, maps: dict) -> Folded:
        dtype = self.dtype if folding.form == "table" else torch.float32
        own = {name: maps[name] for name in file.modulations}
        prefixes = {self._prefix(file, name) for name in own} if file is not self.base else {""}
        return Folded(
            folding=folding, dtype=dtype, maps=own, inputs=self._inputs(folding, prefixes, file)
        )

    def _inputs(
        self, folding: Folding, prefixes: set[str], file: Original
    ) -> dict[str, torch.Tensor]:
        """What the time embedders of this file get."""
        if file.is_bundle:
            prefixes = prefixes - {""}
        name = f"{self.architecture.time_embedder}.folding."
        if folding.form == "table":
            timesteps = torch.tensor(self.timesteps)
            return {f"{prefix}{name}timesteps": timesteps.clone() for prefix in sorted(prefixes)}
        return {
            f"{prefix}{name}directions": self._time_basis(prefix).of_rank(folding.inputs - 1).cpu()
            for prefix in sorted(prefixes)
        }

    def _modulations(self, what: str) -> Iterator[tuple[Original, str]]:
        found = [(file, name) for file in self.files for name in file.modulations]
        for one in Progress(found, desc=what, unit="modulation"):
            yield one
            return_freed_memory()

    def _prefix(self, file: Original, name: str) -> str:
        return embedder_prefix(name, file.stored, self.architecture)

    def _embedder(self, prefix: str, dtype: torch.dtype):
        read = (self.original if prefix else self.base).read
        return open_embedder(self.architecture, self.base.config, read, prefix, dtype, self.device)

    def _inputs_at(self, prefix: str, timesteps: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """silu(conditioning) [timesteps, width] in float32, of a model in this precision as
        diffusers runs it"""
        embedder, given = self._embedder(prefix, dtype), timesteps.to(self.device, dtype)
        with torch.no_grad():
            return F.silu(self.architecture.time_conditioning(embedder, given, dtype)).float()

    # basis

    @lru_cache(maxsize=8)  # noqa: B019 - one run, a few time embedders
    def _time_basis(self, prefix: str) -> TimeBasis:
        return TimeBasis(partial(self._inputs_at, prefix), self._ranks(), self.device)

    def _ranks(self) -> tuple[int, ...]:
        width = self.architecture.width(self.base.config)
        asked = {self.config.rank} if self.config.rank else set()
        ranks = tuple(sorted({*useful_ranks(width), *asked}))
        if not ranks or ranks[-1] >= width:
            raise ValueError(
                f"rank {ranks[-1:] or 1} of {width} inputs saves nothing; fold with --form table"
            )
        return ranks

    def _basis(self) -> tuple[Folding, dict[str, Callable[[], torch.Tensor]], dict]:
        curve = self._curve()
        rank = self.config.rank or curve.smallest_rank(self.config.bound)
        folding = Folding(form="basis", inputs=1 + rank, mark=self.base.mark)

        def make(file: Original, name: str) -> torch.Tensor:
            return_freed_memory()
            basis = self._time_basis(self._prefix(file, name))
            return basis.folded(file.read(f"{name}.weight"), rank)

        maps = {name: partial(make, file, name) for file in self.files for name in file.modulations}
        return folding, maps, {"rank": rank, "bound": self.config.bound, "curve": curve}

    def _curve(self) -> Curve:
        """Error against rank of every modulation."""
        curve = Curve(self._ranks())
        for file, name in self._modulations("measure"):
            weight, bias = (file.read(f"{name}.{leaf}") for leaf in ("weight", "bias"))
            curve.add(name, self._time_basis(self._prefix(file, name)).errors(weight, bias))
        return curve

    # table

    def _table(self) -> tuple[Folding, dict[str, Callable[[], torch.Tensor]], dict]:
        config = self.config
        precision = self.precision if config.host == "diffusers" else "float32"
        self.timesteps = _timesteps(config, self.base, PRECISIONS[precision])
        table = self._values(PRECISIONS[precision])
        folding = Folding(
            form="table",
            inputs=len(self.timesteps),
            batches=table.batches,
            precision=precision,
            mark=self.base.mark,
        )
        maps = {name: partial(table.columns.__getitem__, name) for name in table.columns}
        return (
            folding,
            maps,
            {"timesteps": self.timesteps, "batches": table.batches, "table_bytes": table.nbytes},
        )

    def _values(self, precision: torch.dtype) -> Table:
        model_config = self.base.config
        batches = batches_of(
            self.architecture,
            model_config,
            rows_of(self.architecture, model_config, self._samples()),
        )
        given = {}

        def opened():
            for file, name in self._modulations("table"):
                prefix = self._prefix(file, name)
                if prefix not in given:
                    given[prefix] = conditionings(
                        self._condition(prefix, precision), self.timesteps, batches
                    )
                yield (
                    name,
                    partial(open_modulation, file.read, name, self.dtype, self.device),
                    given[prefix],
                )

        return make_table(opened(), self.timesteps)

    def _condition(
        self, prefix: str, precision: torch.dtype
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        embedder = self._embedder(prefix, self.dtype)
        return lambda t: self.architecture.time_conditioning(
            embedder, t.to(self.device, precision), self.dtype
        )

    def _samples(self) -> list[int]:
        numbers = self.config.samples.replace(",", " ").split()
        if not numbers or not all(re.fullmatch("[1-9][0-9]{0,4}", number) for number in numbers):
            raise ValueError(f"--samples {self.config.samples!r}: whole numbers from 1, as '1 2'")
        if max(map(int, numbers)) > MOST_SAMPLES:
            raise ValueError(
                f"--samples {self.config.samples!r}: numbers from 1 to {MOST_SAMPLES:,}, as '1 2'"
            )
        return [int(number) for number in numbers]


def _timesteps(config: FoldConfig, base: Original, precision: torch.dtype) -> tuple[float, ...]:
    """The timesteps of all schedules, rounded as the model will be given them. An edit model's
    references add the timestep 0, which no schedule steps from."""
    rows = (
        [_numbers(config.timesteps)]
        if config.timesteps
        else [_schedule(config, base, n) for n in _steps(config)]
    )
    wanted = [t for row in rows for t in row] + list(
        base.architecture.reference_timesteps(base.config)
    )
    rounded = torch.tensor(wanted, dtype=torch.float32).to(precision).float().tolist()
    return tuple(dict.fromkeys(rounded))


def _numbers(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        found = []
    if not found or not all(0 <= t <= 1 for t in found):
        raise ValueError(f"--timesteps {text!r}: numbers from 0 to 1, as '1 0.75 0.5'")
    return found


def _steps(config: FoldConfig) -> list[int]:
    parts = config.steps.replace(",", " ").split()
    if not parts or not all(
        re.fullmatch("[1-9][0-9]{0,3}", part) and int(part) <= 1000 for part in parts
    ):
        raise ValueError(f"--steps {config.steps!r}: numbers of sampling steps, as '8 20'")
    return [int(part) for part in parts]


def _schedule(config: FoldConfig, base: Original, steps: int) -> list[float]:
    if not _has_codec(base.path):
        return euler_timesteps(steps)[:-1]
    codec = open_codec(base.path)
    height, width = picture_size(codec, config.height, config.width)
    side = 2 * codec.pixels_per_latent
    return codec.timesteps(steps, (height // side) * (width // side))[:-1]


def _has_codec(path: Path) -> bool:
    if path.is_dir():
        return (path / "model_index.json").exists()
    return has_tables(path)


def _plan_of_folded(plan: PruningPlan, folding: Folding, fingerprint: str) -> PruningPlan:
    """A bundle's plan on its folded base; parameters and bytes are those of what is left."""
    config = {**plan.config, FOLDING: folding.to_config()}
    plan = plan.with_parts(config=config, fingerprint=fingerprint)
    cost = CostModel(architecture_named(plan.architecture), config, (1, 2, 2), 2)
    intervals = tuple(
        replace(i, parameters=i.parameters and cost.student(i).parameters) for i in plan.intervals
    )
    plan = plan.with_parts(intervals=intervals)
    return plan.with_parts(
        variants=tuple(_resized(cost, plan, variant) for variant in plan.variants)
    )


def _resized(cost: CostModel, plan: PruningPlan, variant):
    if not variant.parameters:
        return variant
    parameters = cost.variant(plan, variant).parameters
    size = variant.bytes and round(variant.bytes / variant.parameters * parameters)
    return replace(variant, parameters=parameters, bytes=size)
