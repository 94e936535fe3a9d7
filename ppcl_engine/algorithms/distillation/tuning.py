"""Training on the final velocity that `polish` and `finetune` share: averaged weights, precision,
saves, stopping.

Every batch is a function of (seed, step), so a training that goes on from its last save ends in the
same bits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ...data.calibration import CalibrationSet
from ...settings.base_settings import TuningConfig
from ...system.distributed import processes
from ...system.interruption import stop_on_interrupt
from ...system.json_text import json_text
from ...system.machine import resolve_device
from ...system.progress import Progress, saved
from ...system.seeds import draw_seed
from ...system.tensor_files import OneAtATime, TensorEntry, TensorFile, file_mark
from .compact_state import CODES, COMPACT, FULL, is_packed, scale_shape
from .loop import Session, train_until
from .part_optimizer import MOMENTS, SCALES
from .saved_training import LOSSES, RAW, WEIGHT, SavedParts, check_training, settings_of
from .sharded_walk import ShardedWalk, check_torch
from .sharding import whole, write_together
from .streamed_walk import StreamedWalk
from .trainer import Training, resume_settings, saved_step
from .walks import Chain, ResidentWalk, Rules, Walk

COUNTS = "counts"

SETTINGS = ("steps", "learning_rate", "warm_up", "weight_decay", "ema", "seed", "dtype")


class AveragedTrainer(Training):
    """A training of many parts on one loss. Each part is clipped and takes its step by itself; its
    averaged weights are what is used.

    In files `weight.` is what is used and `raw.` what is trained on; `counts`: updates of each
    parameter.
    """

    def __init__(self, walk: Walk):
        super().__init__()
        self.walk = walk
        self.averages = bool(walk.rules.ema)
        self.shapes = {name: tuple(p.shape) for name, p in walk.module.named_parameters()}

    def update(self, chain: Chain, learning_rate: float, where: str) -> None:
        """One step of AdamW of each part in the chain, as soon as its gradient is there. Raises
        Diverged for a loss or gradient that is not finite."""
        loss = self.walk.loss(chain)
        value = float(processes().sum(loss.detach()))
        self.check_finite("loss", value, where)
        for optimizer in self.walk.gradients():
            if not processes().shards:  # which sum them on the way to their shards
                processes().sum_gradients(optimizer.parameters.values(), loss)
            self.check_finite("gradient", optimizer.clip(), where)
            optimizer.average_until(self.step)  # of steps in which it was off, before it changes
            optimizer.step(learning_rate)
            optimizer.average_until(self.step + 1)
        self.finish_step(value, where)

    def used(self, part: str) -> dict[str, torch.Tensor]:
        """A part's weights as they are to be used, of a training that has ended; sharded where they
        are."""
        with self.walk.at_hand(part, last=True) as optimizer:
            optimizer.average_until(self.step)
            return {**self._tables(part), **optimizer.used()}

    def _tables(self, part: str) -> dict[str, torch.Tensor]:
        """Tensors of a part that training never moves."""
        state = self.walk.module.state_dict()
        return {name: state[name] for name in self.walk.names[part] if name not in self.shapes}

    def tensors(self, part: str, path: Path) -> dict[str, torch.Tensor]:
        """What a file has of a part that a save at `path` needs; sharded where it is. Raises
        Diverged for what is not finite."""
        with self.walk.at_hand(part, last=True) as optimizer:
            optimizer.average_until(self.step)
            raw = optimizer.parameters if self.averages else {}
            used = self._tables(part) | optimizer.used() | optimizer.average
            tensors = {f"{WEIGHT}{name}": tensor for name, tensor in used.items()}
            tensors |= {f"{RAW}{name}": tensor.detach() for name, tensor in raw.items()}
            tensors |= optimizer.moments()
            self.check_finite_tensors(tensors, path)
            return tensors

    def write(self, path: Path, metadata: dict[str, str]) -> None:
        """A part at a time."""
        counts, state = self.walk.counts(), self.walk.module.state_dict()
        entries, read = [], OneAtATime(partial(self.tensors, path=path))
        for part, names in self.walk.names.items():
            for key, dtype, shape in self._keys({name: state[name] for name in names}, counts):
                make = partial(_read_whole, read, part, key)
                entries.append(TensorEntry(key, dtype, shape, make))
        for key, values in {LOSSES: self.losses, COUNTS: [counts[n] for n in self.shapes]}.items():
            row = torch.tensor(values, dtype=torch.float32)
            entries.append(TensorEntry(key, row.dtype, tuple(row.shape), partial(torch.clone, row)))
        write_together(path, entries, metadata)

    def _keys(
        self, tensors: dict[str, torch.Tensor], counts: dict[str, float]
    ) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name in the file, type, shape)"""
        compact = self.walk.rules.compact
        for name, tensor in tensors.items():
            shape, trained = tuple(tensor.shape), name in self.shapes
            averaged = self.averages and trained
            yield (
                f"{WEIGHT}{name}",
                torch.bfloat16 if averaged and compact else tensor.dtype,
                shape,
            )
            if averaged:
                yield f"{RAW}{name}", tensor.dtype, shape
            packed = compact and is_packed(shape)
            for kind in MOMENTS if counts.get(name) else ():
                yield f"{kind}.{name}", CODES if packed else tensor.dtype, shape
                if packed:
                    yield f"{SCALES[kind]}.{name}", tensor.dtype, scale_shape(shape)

    def save(self, path: Path, settings: str) -> None:
        super().save(path, settings)
        self.walk.was_saved(self._saved_parts(TensorFile(path)), self.step)

    def restore(self, path: Path) -> None:
        """Raises ValueError for a file that lacks a tensor, or whose tensors are not finite."""
        file = TensorFile(path)
        check_training(file, self.shapes)
        self.restore_progress(file)
        self.walk.go_on_from(self._saved_parts(file), self.step)

    def _saved_parts(self, file: TensorFile) -> SavedParts:
        counts = dict(zip(self.shapes, file.read(COUNTS).tolist(), strict=True))
        return SavedParts(file=file, names=self.walk.names, counts=counts, averaged=self.averages)


def _read_whole(read: OneAtATime, part: str, name: str) -> torch.Tensor:
    return whole(read(part, name))


def tune(
    trainer: AveragedTrainer,
    chain_at: Callable[[int], Chain],
    config: TuningConfig,
    path: Path,
    settings: str,
    what: str,
) -> int:
    """Trains to `config.steps`, on from what is saved in `path`; returns the steps done before.
    `chain_at(step)`.

    Raises Stopped on Ctrl-C after saving, and Diverged (a ValueError) with the last saved state
    kept.
    """
    before = saved_step(path, settings) or 0
    if before:
        trainer.restore(path)
    progress = Progress(total=config.steps, initial=before, desc=what, unit="step")

    def save() -> None:
        trainer.save(path, settings)
        saved()

    with stop_on_interrupt() as asked, progress:
        session = Session(rates=config, steps=config.steps, progress=progress, stop_asked=asked)
        while trainer.step < config.steps:
            next_save = (trainer.step // config.save_every + 1) * config.save_every
            train_until(min(next_save, config.steps), trainer, chain_at, what, session, save)
            save()
    return before


def check_can_shard(config: TuningConfig) -> None:
    """Raises ValueError, before anything is loaded, for a setting or a torch that processes which
    shard a training cannot go with."""
    if not processes().shards:
        return
    check_torch()
    if config.unshardable:
        raise ValueError(
            f"{config.unshardable}: processes that shard a training keep all of it on their devices, in float32; leave it "
            "out, or use --parallel data"
        )


def walk_fills(config: TuningConfig) -> bool:
    """Whether a module's blocks begin on the meta device, and the walk fills them."""
    return config.streamed or processes().shards


@contextmanager
def walking(
    module: nn.Module,
    places: Sequence[Sequence[str]],
    begin: Callable[[str], dict[str, torch.Tensor]],
    config: TuningConfig,
    folder: Path,
) -> Iterator[Walk]:
    """As the settings say. module: its blocks on the meta device where the walk fills them; places:
    the parts that stand at one place together; begin: as StreamedWalk has it; folder: where what is
    streamed waits on disk."""
    parts = [part for together in places for part in together]
    compact = config.optimizer_state == COMPACT
    rules = Rules(weight_decay=config.weight_decay, ema=config.ema, compact=compact)
    folder = processes().folder(folder)
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    device = resolve_device(config.device)
    if processes().shards:
        again = config.checkpointing or config.streamed
        yield ShardedWalk(module, places, rules, begin, device, again)
        return
    if not config.streamed:
        yield ResidentWalk(module, parts, rules, config.checkpointing)
        return
    waits_in = folder if config.offload == "disk" else None
    walk = StreamedWalk(module, parts, rules, begin, device, waits_in)
    try:
        yield walk
    finally:
        walk.close()


def tuning_settings(
    config: TuningConfig, calibration: CalibrationSet, sources: Iterable[Path], **more
) -> str:
    """The settings that decide a training's result. `sources`: the files of the parts that it
    starts from."""
    marks = {path.name: file_mark(path) for path in sources}
    # left out where it is off, for files from before that setting existed
    state = ("optimizer_state",) if config.optimizer_state != FULL else ()
    return json_text(
        {
            **resume_settings(config, (*SETTINGS, *state)),
            **more,
            "calibration": calibration.hash[:16],
            "sources": marks,
        }
    )


def forget_if_stale(path: Path, settings: str) -> None:
    """Removes a saved training that started from the same parts, which have been trained anew
    since."""
    if processes().writes and path.exists():
        old, new = settings_of(TensorFile(path)).get("sources"), json.loads(settings)["sources"]
        if isinstance(old, dict) and old.keys() == new.keys() and old != new:
            path.unlink()
    processes().wait()


def step_draw(config: TuningConfig, calibration: CalibrationSet, step: int) -> tuple[int, int]:
    """(batch, seed) for `CalibrationSet.fresh`: the batches in turn, each time with new noise and
    timesteps."""
    return step % len(calibration), draw_seed(config.seed, step)
