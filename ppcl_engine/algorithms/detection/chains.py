"""How the curves of `curves.py` are measured: by chains of states, from every block to the end of
the model.

Chains start from stored boundary states and only run the blocks after k: per batch and curve, the
sum over pairs (u, k) of (last - k) block passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...architectures import BlockState
from ...models.streaming import StateStore, Teacher
from ...run import Run
from ...settings.prune_settings import DetectConfig
from ...system.progress import Progress
from ...system.tensor_files import write_tensors
from ..grouping import groups_within
from ..least_squares import RIDGE, InputMoments, NormalEquations
from ..resampling import bootstrap_subsets, drawn_tokens, squares
from .alignment import biased_hsic, cka, hsic, linear_gram, rbf_gram
from .curves import FIT, STREAMS, Curves, section_starts
from .intervals import reach
from .stream_maps import Maps, apply_maps, load_probe

PROBE, MAP, STEPS = "probe", "map", "steps"


@dataclass(frozen=True, kw_only=True)
class ChainBatch:
    """One batch of the chains from one block; its states are in memory together while they go
    through the blocks."""

    u: int
    """the block that the chains start behind"""
    end: int
    """the last block that they may replace"""
    batch: int
    """its number"""
    bytes: float
    """that its states and maps take in memory"""


def bytes_of(group: Sequence[ChainBatch]) -> float:
    """What a group needs in memory to walk through the blocks together."""
    return sum(chain_batch.bytes for chain_batch in group)


def chains_of(u: int, end: int, held_out: bool, local: bool) -> int:
    """How many chains from block u a batch goes through."""
    return (end - u) * ((0 if local else 1) + (1 if held_out else 0))


def chain_batches(
    ends: Mapping[int, int], sizes: Sequence[int], width: int, local: bool
) -> Iterator[ChainBatch]:
    """Every batch of the chains from every block, in the order in which they are measured.

    ends: block -> the last one that its chains may replace; sizes: bytes of each batch's state, the
    second half of which is held out.
    """
    for u, end in ends.items():
        for batch, size in enumerate(sizes) if end > u else ():
            maps = (end - u) * len(STREAMS) * torch.float32.itemsize * width**2 if batch == 0 else 0
            chains = 1 + chains_of(u, end, batch >= len(sizes) // 2, local)
            yield ChainBatch(u=u, end=end, batch=batch, bytes=chains * size + maps)


def measure(
    config: DetectConfig,
    run: Run,
    teacher: Teacher,
    inputs: list,
    settings: str,
    curves: Curves | None,
    done: int,
) -> Curves:
    """Both curves for every pair, saved whenever some chains reach the end; `curves` already covers
    the `done` first blocks.

    The second half of the batches is held out of the least-squares maps.
    """
    if len(inputs) < 2:
        raise ValueError(
            "detect needs at least two calibration batches; calibrate with a smaller --batch"
        )
    with torch.no_grad():
        measurement = _Measurement(config, run, teacher, inputs)
        measurement.curves = curves or measurement.curves
        for covered in measurement.work(done):
            metadata = {"settings": settings, "blocks": str(covered)}
            write_tensors(run.curves, measurement.curves.tensors(), metadata, gaps=True)
        measurement.store.clear()
    return measurement.curves


class _Measurement:
    """The teacher's boundary states, and the chains that start from them."""

    def __init__(self, config: DetectConfig, run: Run, teacher: Teacher, inputs: list):
        self.config, self.run, self.teacher = config, run, teacher
        self.store = StateStore(run.states / "detect" if config.streamed else None)
        self.chains = StateStore(None, rest="cpu" if config.streamed else None)
        self.embedded = [teacher.embed(row) for row in inputs]
        self.batches = range(len(inputs))
        self.fitted, self.held_out = (
            self.batches[: len(inputs) // 2],
            self.batches[len(inputs) // 2 :],
        )
        self.last = teacher.num_blocks - 1
        self.starts = section_starts(teacher)
        samples = sum(len(state.image) for state in self.embedded)
        real = [state.real("image") for state in self.embedded]
        tokens = min(config.tokens, *(int(mask.sum(1).min()) for mask in real))
        generator = torch.Generator().manual_seed(config.seed)
        self.drawn = [drawn_tokens(mask, tokens, generator) for mask in real]
        """of each batch: the image tokens that are compared, [n, tokens], without references"""
        self.subsets = bootstrap_subsets(samples, tokens, config.bootstrap, config.seed)
        self.maps: dict[int, dict[int, Maps]] = {}
        self.seen: dict[tuple[int, int], dict[int, torch.Tensor]] = {}
        self._sweep()
        shape = (teacher.num_blocks, min(config.longest, teacher.num_blocks))
        self.curves = Curves(
            torch.full((*shape, config.bootstrap + 1), torch.nan, dtype=torch.float64),
            torch.full((*shape, len(self.power)), torch.nan, dtype=torch.float64),
            self.power,
            torch.full((*shape, len(STREAMS), len(FIT)), torch.nan, dtype=torch.float64),
        )

    def work(self, done: int) -> Iterator[int]:
        """Yields how many first blocks are covered, whenever the number grows."""
        limit = self.config.cache_gb * 1e9 if self.config.streamed else 0
        chain_batches = list(self._chain_batches())
        total, before = (
            sum(self.last - p.u for p in chain_batches if p.u < n) for n in (self.last, done)
        )
        with Progress(total=total, initial=before, desc="detect", unit="block") as progress:
            covered = done
            for group in groups_within(limit, (p for p in chain_batches if p.u >= done), bytes_of):
                self._walk(group, progress)
                ends = group[-1].u + (group[-1].batch == self.batches[-1])
                for u in range(covered, ends):
                    self._align(u)
                if ends > covered:
                    covered = ends
                    yield covered
        if covered < self.last:
            yield self.last

    def _chain_batches(self) -> Iterator[ChainBatch]:
        ends = {
            u: reach(u, self.last + 1, self.config.longest, self.starts) for u in range(self.last)
        }
        sizes = [state.image.nbytes + state.text.nbytes for state in self.embedded]
        return chain_batches(ends, sizes, self.embedded[0].image.shape[-1], self.config.local)

    def _sweep(self) -> None:
        """Stores every boundary of every batch, the teacher's velocity, and the end features that
        CKA compares."""
        for batch, state in enumerate(self.embedded):
            self.store.put(0, batch, state)
        for index, block in self.teacher.walk(0, self.last):
            for batch, like in enumerate(self.embedded):
                self.store.put(
                    index + 1, batch, self._run(block, self.store.get(index, batch, like))
                )
        ends = [self._state(self.last + 1, batch) for batch in self.batches]
        self.velocities = {batch: self._velocity(ends[batch]) for batch in self.held_out}
        self.power = torch.cat([squares(v) for v in self.velocities.values()]).cpu()
        features = [self._features(state, batch) for batch, state in enumerate(ends)]
        self.end_gram: torch.Tensor | None = None if self.config.local else self._gram(features)

    def _walk(self, group: list[ChainBatch], progress: Progress) -> None:
        """From the group's first block to the end: at block i the chains that end at i branch off,
        and earlier ones go on."""
        wanted = {chain_batch.u for chain_batch in group}
        self.maps = {u: self.maps.get(u) or self._least_squares(u) for u in wanted}
        for chain_batch in group:
            self.chains.put(
                f"{STEPS}_{chain_batch.u}",
                chain_batch.batch,
                self._state(chain_batch.u + 1, chain_batch.batch),
            )
        going: list[tuple[str, int]] = []
        for index, block in self.teacher.walk(group[0].u + 1, self.last):
            for name, batch in going:
                state = self.chains.get(name, batch, self.embedded[batch])
                self.chains.put(name, batch, self._run(block, state))
            branching = [
                chain_batch for chain_batch in group if chain_batch.u < index <= chain_batch.end
            ]
            probe = self._probe(index) if branching else {}
            for chain_batch in branching:
                going += self._branch(chain_batch, index, probe)
            progress.update(sum(chain_batch.u < index for chain_batch in group))
        for name, batch in going:
            self._close(name, batch)

    def _probe(self, index: int) -> Maps:
        maps = load_probe(self.run.probe(index)).items()
        return {
            stream: (w.to(self.teacher.device), b.to(self.teacher.device))
            for stream, (w, b) in maps
        }

    def _branch(self, chain_batch: ChainBatch, k: int, probe: Maps) -> Iterator[tuple[str, int]]:
        """Starts the pair's probe chain and least-squares chain; with local alignment the probe
        chain ends here."""
        u, batch = chain_batch.u, chain_batch.batch
        if batch in self.held_out:
            start = apply_maps(self._state(u + 1, batch), self.maps[u][k])
            self.chains.put(f"{MAP}_{u}_{k}", batch, start)
            yield f"{MAP}_{u}_{k}", batch
        steps = apply_maps(self.chains.get(f"{STEPS}_{u}", batch, self.embedded[batch]), probe)
        if k < chain_batch.end:
            self.chains.put(f"{STEPS}_{u}", batch, steps)
        else:
            self.chains.drop(f"{STEPS}_{u}", batch)
        if self.config.local:
            self.seen.setdefault((u, k), {})[batch] = self._features(steps, batch)
        else:
            self.chains.put(f"{PROBE}_{u}_{k}", batch, steps)
            yield f"{PROBE}_{u}_{k}", batch

    def _least_squares(self, u: int) -> dict[int, Maps]:
        """k -> the best affine map from the state after u to the state after k: a student's closed
        form. The moments of u's state are the same for every k."""
        width, inputs, maps_by_end = self.embedded[0].image.shape[-1], {}, {}
        for k in range(u + 1, reach(u, self.last + 1, self.config.longest, self.starts) + 1):
            streams = self.teacher.used_streams(k)
            new = [stream for stream in streams if stream not in inputs]
            inputs |= {stream: InputMoments(width, self.teacher.device) for stream in new}
            equations = {
                s: NormalEquations(width, width, self.teacher.device, inputs[s]) for s in streams
            }
            for batch in self.fitted:
                before, after = self._state(u + 1, batch), self._state(k + 1, batch)
                for stream, sums in equations.items():
                    x = before.real_tokens(stream).float()
                    if stream in new:
                        inputs[stream].add(x)
                    sums.add(x, after.real_tokens(stream).float() - x)
            maps_by_end[k] = {
                stream: self._solved(u, k, stream, sums) for stream, sums in equations.items()
            }
        return maps_by_end

    def _solved(
        self, u: int, k: int, stream: str, equations: NormalEquations
    ) -> tuple[torch.Tensor, torch.Tensor]:
        solution = equations.solve(RIDGE)
        numbers = [
            torch.nan if (number := solution.report[name]) is None else number for name in FIT
        ]
        self.curves.fit[u, k - u, STREAMS.index(stream)] = torch.tensor(
            numbers, dtype=torch.float64
        )
        return solution.weight.float().cpu(), solution.bias.float().cpu()

    def _close(self, name: str, batch: int) -> None:
        kind, u, k = name.split("_")
        u, k = int(u), int(k)
        state = self.chains.get(name, batch, self.embedded[batch])
        if kind == PROBE:
            self.seen.setdefault((u, k), {})[batch] = self._features(state, batch)
        else:
            first = sum(len(self.embedded[b].image) for b in self.held_out if b < batch)
            error = squares(self._velocity(state) - self.velocities[batch]).cpu()
            self.curves.error[u, k - u, first : first + len(error)] = error
        self.chains.drop(name, batch)

    def _align(self, u: int) -> None:
        """The alignment of all pairs of u, whose chains have reached the end in every batch."""
        for k in range(u + 1, reach(u, self.last + 1, self.config.longest, self.starts) + 1):
            seen = self.seen.pop((u, k))
            here = self.end_gram
            if here is None:
                here = self._gram(
                    [self._features(self._state(k + 1, batch), batch) for batch in self.batches]
                )
            self.curves.cka[u, k - u] = self._cka(
                self._gram([seen[batch] for batch in self.batches]), here
            )

    def _state(self, boundary: int, batch: int) -> BlockState:
        return self.store.get(boundary, batch, self.embedded[batch])

    def _run(self, block: nn.Module, state: BlockState) -> BlockState:
        return self.teacher.architecture.run_block(block, state)

    def _velocity(self, state: BlockState) -> torch.Tensor:
        return self.teacher.architecture.finish(self.teacher.outer, state)

    def _cka(self, ours: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return cka(ours, teacher, self.subsets, biased_hsic if self.config.biased else hsic)

    def _features(self, state: BlockState, batch: int) -> torch.Tensor:
        """[n * tokens, d]: the drawn image tokens of a batch."""
        image = self.teacher.architecture.final_image(self.teacher.outer, state)
        chosen = self.drawn[batch][..., None].expand(-1, -1, image.shape[-1])
        return torch.gather(image, 1, chosen.to(image.device)).flatten(0, 1).cpu()

    def _gram(self, features: list[torch.Tensor]) -> torch.Tensor:
        rows = torch.cat(features)
        return linear_gram(rows) if self.config.kernel == "linear" else rbf_gram(rows)
