"""The two curves that intervals are chosen by, over pairs of blocks (u, k): the CKA curve and the
damage.

Block u stays real and what follows up to k is replaced: by the probes (`cka`, the paper's curve),
or by one least-squares map (`error`, what a student's closed form leaves on the final velocity).
Chains start from cached boundary states and only run the blocks behind k: sum over pairs (u, k) of
(last - k) block passes a batch and curve.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ...architectures import BlockState
from ...models.streaming import StateStore, Teacher
from ...run import Run
from ...settings.prune_settings import DetectConfig
from ...system.progress import Progress
from ...system.tensor_files import TensorFile, write_tensors
from ..least_squares import NormalEquations
from ..resampling import bootstrap_subsets
from .alignment import biased_hsic, cka, hsic, linear_gram, rbf_gram
from .intervals import reach

RIDGE = 1e-4


@dataclass(frozen=True)
class Curves:
    """cka [blocks, longest, 1 + resamples], first column all samples; NaN where there is no pair.
    error [blocks, longest, held-out samples] and power [held-out samples]: squared error of the
    final velocity and its own square, summed over a sample. Entry [u, j] belongs to the interval
    [u, u + j]."""

    cka: torch.Tensor
    error: torch.Tensor
    power: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"cka": self.cka, "error": self.error, "power": self.power}

    def cka_of(self, column: int) -> Callable[[int, int], float]:
        table = self.cka[:, :, column].tolist()
        return lambda u, k: table[u][k - u]

    def damage_of(self, weights: torch.Tensor) -> Callable[[int, int], float]:
        """weights [held-out samples]: how often each sample counts."""
        table = (self.error @ weights / (self.power @ weights)).tolist()
        return lambda u, k: table[u][k - u]


def section_starts(teacher: Teacher) -> frozenset[int]:
    """First blocks of the runs of one kind: no interval goes on over one."""
    return frozenset(section.start for section in teacher.architecture.sections(teacher.config))


def block_passes(
    blocks: int, longest: int, curves: int, starts: frozenset[int] = frozenset()
) -> int:
    """Teacher blocks that a batch goes through: one sweep, and (last - k) for every pair of every
    full curve."""
    pairs = [
        (u, k) for u in range(blocks) for k in range(u + 1, reach(u, blocks, longest, starts) + 1)
    ]
    return blocks + curves * sum(blocks - 1 - k for _, k in pairs)


def load_curves(path: Path, settings: str) -> tuple[Curves | None, int]:
    """Curves of the same settings, and how many first blocks they cover."""
    if path.exists() and (file := TensorFile(path)).metadata.get("settings") == settings:
        return Curves(**file.read_all()), int(file.metadata["blocks"])
    return None, 0


def measure(
    config,
    run: Run,
    teacher: Teacher,
    inputs: list,
    settings: str,
    curves: Curves | None,
    done: int,
) -> Curves:
    """Both curves of every pair, saved block by block. The second half of the batches is held out
    of the least-squares maps."""
    if len(inputs) < 2:
        raise ValueError(
            "detect needs at least two calibration batches; calibrate with a smaller --batch"
        )
    with torch.no_grad():
        measurement = _Measurement(config, run, teacher, inputs)
        measurement.curves = curves or measurement.curves
        blocks = range(done, teacher.num_blocks - 1)
        for u in Progress(
            blocks, initial=done, total=teacher.num_blocks - 1, desc="detect", unit="block"
        ):
            measurement.chains_from(u)
            write_tensors(
                run.curves,
                measurement.curves.tensors(),
                {"settings": settings, "blocks": str(u + 1)},
            )
        measurement.store.clear()
    return measurement.curves


class _Measurement:
    """Boundary states of the teacher, and the chains that start from them."""

    def __init__(self, config: DetectConfig, run: Run, teacher: Teacher, inputs: list):
        self.config, self.run, self.teacher = config, run, teacher
        self.store = StateStore(run.states / "detect" if config.streamed else None)
        self.embedded = [teacher.embed(row) for row in inputs]
        self.fitted = range(len(inputs) // 2)
        self.held_out = range(len(inputs) // 2, len(inputs))
        self.last = teacher.num_blocks - 1
        self.starts = section_starts(teacher)
        samples = sum(len(state.image) for state in self.embedded)
        self.subsets = bootstrap_subsets(samples, config.tokens, config.bootstrap, config.seed)
        self._sweep()
        shape = (teacher.num_blocks, min(config.longest, teacher.num_blocks))
        self.curves = Curves(
            torch.full((*shape, config.bootstrap + 1), torch.nan, dtype=torch.float64),
            torch.full((*shape, len(self.power)), torch.nan, dtype=torch.float64),
            self.power,
        )

    def _sweep(self) -> None:
        """Every boundary of every batch, the teacher's velocity and its Gram matrix."""
        for batch, state in enumerate(self.embedded):
            self.store.put(0, batch, state)
        for index, block in self.teacher.walk(0, self.last):
            for batch, like in enumerate(self.embedded):
                self.store.put(
                    index + 1, batch, self._run(block, self.store.get(index, batch, like))
                )
        ends = [self._state(self.last + 1, batch) for batch in range(len(self.embedded))]
        self.velocities = {batch: self._velocity(ends[batch]) for batch in self.held_out}
        self.power = torch.cat([_per_sample(v) for v in self.velocities.values()])
        self.end_gram = None if self.config.local else self._gram(ends)

    def chains_from(self, u: int) -> None:
        """One walk from u to the end: at block i the chains that end at i branch off, earlier ones
        go on."""
        end = reach(u, self.last + 1, self.config.longest, self.starts)
        if end == u:
            return
        steps = {batch: self._state(u + 1, batch) for batch in range(len(self.embedded))}
        open_chains: list[str] = []
        for index, block in self.teacher.walk(u + 1, self.last):
            for name in open_chains:
                self._advance(name, block)
            if index <= end:
                steps = self._through_probe(index, steps)
                open_chains += self._branch(u, index, steps)
        for name in open_chains:
            self._close(u, name)

    def _through_probe(self, index: int, states: dict[int, BlockState]) -> dict[int, BlockState]:
        maps = load_probe(self.run.probe(index))
        return {batch: apply_maps(state, maps) for batch, state in states.items()}

    def _branch(self, u: int, k: int, steps: dict[int, BlockState]) -> list[str]:
        """Starts the probe chain and the least-squares chain of the pair; local alignment ends
        here."""
        maps = self._least_squares(u, k)
        for batch in self.held_out:
            self.store.put(f"map_{k}", batch, apply_maps(self._state(u + 1, batch), maps))
        if self.config.local:
            here = self._gram([self._state(k + 1, batch) for batch in range(len(self.embedded))])
            self.curves.cka[u, k - u] = self._cka(self._gram(list(steps.values())), here)
            return [f"map_{k}"]
        for batch, state in steps.items():
            self.store.put(f"probe_{k}", batch, state)
        return [f"map_{k}", f"probe_{k}"]

    def _least_squares(self, u: int, k: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Best affine map from the state after u to the state after k: a student's closed form."""
        maps = {}
        for stream in self.teacher.used_streams(k):
            width = self.embedded[0].image.shape[-1]
            equations = NormalEquations(width, width, self.teacher.device)
            for batch in self.fitted:
                x = self._state(u + 1, batch).real_tokens(stream)
                equations.add(x, self._state(k + 1, batch).real_tokens(stream) - x)
            solution = equations.solve(RIDGE)
            maps[stream] = (solution.weight, solution.bias)
        return maps

    def _advance(self, name: str, block: torch.nn.Module) -> None:
        for batch in self._batches(name):
            state = self.store.get(name, batch, self.embedded[batch])
            self.store.put(name, batch, self._run(block, state))

    def _close(self, u: int, name: str) -> None:
        kind, k = name.split("_")
        states = [
            self.store.get(name, batch, self.embedded[batch]) for batch in self._batches(name)
        ]
        if kind == "probe":
            self.curves.cka[u, int(k) - u] = self._cka(self._gram(states), self.end_gram)
        else:
            errors = [
                self._velocity(s) - v for s, v in zip(states, self.velocities.values(), strict=True)
            ]
            self.curves.error[u, int(k) - u] = torch.cat([_per_sample(e) for e in errors])
        for batch in self._batches(name):
            self.store.drop(name, batch)

    def _batches(self, name: str) -> range:
        return range(len(self.embedded)) if name.startswith("probe") else self.held_out

    def _state(self, boundary: int, batch: int) -> BlockState:
        return self.store.get(boundary, batch, self.embedded[batch])

    def _run(self, block: torch.nn.Module, state: BlockState) -> BlockState:
        return self.teacher.architecture.run_block(block, state)

    def _velocity(self, state: BlockState) -> torch.Tensor:
        return self.teacher.architecture.finish(self.teacher.outer, state)

    def _cka(self, ours: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return cka(ours, teacher, self.subsets, biased_hsic if self.config.biased else hsic)

    def _gram(self, states: list[BlockState]) -> torch.Tensor:
        """Gram matrix of a few image tokens of every sample, the same places for all."""
        generator = torch.Generator().manual_seed(self.config.seed)
        rows = []
        for state in states:
            image = self.teacher.architecture.final_image(self.teacher.outer, state)
            order = torch.rand(image.shape[:2], generator=generator).masked_fill(
                ~state.real("image").cpu(), 2.0
            )
            places = order.argsort(1)[:, : self.config.tokens]
            rows.append(
                torch.gather(
                    image, 1, places[..., None].expand(-1, -1, image.shape[-1]).to(image.device)
                )
            )
        features = torch.cat([r.flatten(0, 1) for r in rows]).cpu()
        return linear_gram(features) if self.config.kernel == "linear" else rbf_gram(features)


def apply_maps(state: BlockState, maps: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> BlockState:
    """x + W x + b on each stream that has a map."""
    streams = {"image": state.image, "text": state.text}
    for stream, (weight, bias) in maps.items():
        x = streams[stream]
        streams[stream] = x + x @ weight.T.to(x) + bias.to(x)
    return state.with_streams(**streams)


def _per_sample(x: torch.Tensor) -> torch.Tensor:
    return x.double().square().flatten(1).sum(1).cpu()


def load_probe(path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """stream -> (weight, bias). Raises ValueError when the probe is missing."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; run probe first")
    file = TensorFile(path)
    streams = [name.split(".")[0] for name in file.keys() if name.endswith(".weight")]
    return {
        stream: (file.read(f"{stream}.weight"), file.read(f"{stream}.bias")) for stream in streams
    }
