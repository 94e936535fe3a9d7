"""Detect: which runs of blocks one student can replace (paper, section 3.2).

For every block u and every k within reach, block u stays real and what follows up to k is replaced:
by the probes (`cka`, the paper's curve), or by one least-squares map (`damage`, the error that a
student's closed form leaves on the final velocity). Chains start from cached boundary states and
only run the blocks behind k: sum over pairs (u, k) of (last - k) block passes a batch and curve.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .. import __version__
from ..architectures import BlockState
from ..config import DetectConfig
from ..files import TensorFile, write_json, write_tensors, write_text
from ..intervals import budget_intervals, curve_scale, first_difference, greedy_intervals, reach, stability
from ..plan import Interval, PruningPlan
from ..progress import Progress
from ..run import Run, load_probe, open_calibration, open_teacher
from ..similarity import NormalEquations, biased_hsic, bootstrap_subsets, cka, hsic, linear_gram, rbf_gram
from ..streaming import StateStore, Teacher

PUBLISHED_SHARE = 25 / 60
RIDGE = 1e-4


def detect(config: DetectConfig) -> Path:
    """Writes `curves.safetensors` (kept while its settings hold), `detect.json` and `plan.json`."""
    run, teacher = Run(config.run), open_teacher(config)
    calibration = open_calibration(config, teacher.weights)
    protect = _protected(config, teacher.num_blocks)
    probes = [TensorFile(path).metadata.get("settings") for path in sorted(run.probes.glob("block_*.safetensors"))]
    names = ("samples", "longest", "kernel", "biased", "local", "tokens", "bootstrap", "seed", "dtype")
    measured = {name: getattr(config, name) for name in names}
    settings = json.dumps({"calibration": calibration.hash, "probes": probes, **measured})
    curves, measured_blocks = _load_curves(run.curves, settings)
    if measured_blocks < teacher.num_blocks - 1:
        batches = max(2, round(config.samples / calibration.samples * len(calibration)))
        curves = _measure(config, run, teacher, calibration.all_inputs()[:batches], settings, curves, measured_blocks)
    result = choose(config, curves, protect, section_starts(teacher))
    write_json(run.detection, result)
    plan = PruningPlan(
        architecture=teacher.architecture.name,
        config=teacher.config,
        num_blocks=teacher.num_blocks,
        fingerprint=teacher.weights.fingerprint,
        intervals=tuple(Interval(**row) for row in result["intervals"]),
        provenance={
            "tool": f"ppcl {__version__}",
            "source_model": Path(config.model).name,
            "calibration": calibration.hash,
            "method": config.method,
            "seed": config.seed,
        },
    )
    write_text(run.plan, plan.to_json() + "\n")
    if config.explain:
        print("\n".join(result["explain"]))
    return run.plan


@dataclass(frozen=True)
class Curves:
    """cka [blocks, longest, 1 + resamples], first column all samples; NaN where there is no pair.
    error [blocks, longest, held-out samples] and power [held-out samples]: squared error of the final
    velocity and its own square, summed over a sample. Entry [u, j] belongs to the interval [u, u + j]."""

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


def choose(config: DetectConfig, curves: Curves, protect: frozenset[int], starts: frozenset[int] = frozenset()) -> dict:
    """Intervals by the configured rule, their stability over resamples, and both rules' explanations."""
    blocks, longest = curves.cka.shape[:2]
    scale = curve_scale(curves.cka_of(0), blocks, longest, starts)
    remove = config.remove or round(blocks * PUBLISHED_SHARE)
    damage = curves.damage_of(torch.ones_like(curves.power))
    rules = {
        "ppcl": partial(_greedy, config, blocks, longest, protect, starts),
        "budget": lambda cost: budget_intervals(cost, blocks, longest, remove, protect, starts),
    }
    curve = curves.cka_of(0)
    explained = greedy_intervals(curve, blocks, longest, scale, config.eps, config.max_drop, protect, starts)
    resamples = curves.cka.shape[2] - 1
    if config.method == "ppcl":
        chosen = rules["ppcl"](curve)
        again = [rules["ppcl"](curves.cka_of(column)) for column in range(1, resamples + 1)]
    else:
        chosen = rules["budget"](damage)
        again = [
            rules["budget"](curves.damage_of(weights)) for weights in _sample_weights(curves, resamples, config.seed)
        ]
    shares = stability(chosen, again) if resamples else [None] * len(chosen)
    return {
        "method": config.method,
        "intervals": [
            {"first": u, "last": v, "score": damage(u, v), "stability": share}
            for (u, v), share in zip(chosen, shares, strict=True)
        ],
        "explain": _explanation(config, explained, chosen, curves, damage, starts),
        "block_passes_per_batch": block_passes(blocks, longest, 1 if config.local else 2, starts),
        "curve_scale": scale,
    }


def block_passes(blocks: int, longest: int, curves: int, starts: frozenset[int] = frozenset()) -> int:
    """Teacher blocks that a batch goes through: one sweep, and (last - k) for every pair of every full curve."""
    pairs = [(u, k) for u in range(blocks) for k in range(u + 1, reach(u, blocks, longest, starts) + 1)]
    return blocks + curves * sum(blocks - 1 - k for _, k in pairs)


def _greedy(config, blocks, longest, protect, starts, curve) -> list[tuple[int, int]]:
    scale = curve_scale(curve, blocks, longest, starts)
    found = greedy_intervals(curve, blocks, longest, scale, config.eps, config.max_drop, protect, starts)
    return [(f.first, f.last) for f in found if f.last > f.first]


def _sample_weights(curves: Curves, resamples: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    samples = len(curves.power)
    choice = torch.randint(samples, (resamples, samples), generator=generator)
    return [torch.bincount(row, minlength=samples).double() for row in choice]


def _explanation(config, greedy, chosen, curves: Curves, damage, starts) -> list[str]:
    lines = [f"ppcl {f.first}-{f.last}: ends because {f.reason}" for f in greedy]
    if config.method == "budget":
        for u, v in chosen:
            last = reach(u, *curves.cka.shape[:2], starts)
            longer = f"; to {v + 1}: {damage(u, v + 1):.4f}" if v < last else ""
            drop = first_difference(curves.cka_of(0), u, v)
            lines.append(f"budget {u}-{v}: damage {damage(u, v):.4f}, D at its end {drop:.5f}{longer}")
    passes = block_passes(*curves.cka.shape[:2], 1 if config.local else 2, starts)
    return [*lines, f"cost: {passes:,} block passes a batch"]


def _protected(config: DetectConfig, blocks: int) -> frozenset[int]:
    words = config.protect.replace(",", " ").split()
    if not all(word.isdigit() and int(word) < blocks for word in words):
        raise ValueError(f"--protect {config.protect!r}: give block numbers from 0 to {blocks - 1}, as '0 1'")
    return frozenset(map(int, words))


def _load_curves(path: Path, settings: str) -> tuple[Curves | None, int]:
    """Curves of the same settings, and how many first blocks they cover."""
    if path.exists() and (file := TensorFile(path)).metadata.get("settings") == settings:
        return Curves(**file.read_all()), int(file.metadata["blocks"])
    return None, 0


def _measure(
    config, run: Run, teacher: Teacher, inputs: list, settings: str, curves: Curves | None, done: int
) -> Curves:
    """Both curves of every pair, saved block by block. The second half of the batches is held out of the
    least-squares maps."""
    if len(inputs) < 2:
        raise ValueError("detect needs at least two calibration batches; calibrate with a smaller --batch")
    with torch.no_grad():
        measurement = _Measurement(config, run, teacher, inputs)
        measurement.curves = curves or measurement.curves
        blocks = range(done, teacher.num_blocks - 1)
        for u in Progress(blocks, initial=done, total=teacher.num_blocks - 1, desc="detect", unit="block"):
            measurement.chains_from(u)
            write_tensors(run.curves, measurement.curves.tensors(), {"settings": settings, "blocks": str(u + 1)})
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
                self.store.put(index + 1, batch, self._run(block, self.store.get(index, batch, like)))
        ends = [self._state(self.last + 1, batch) for batch in range(len(self.embedded))]
        self.velocities = {batch: self._velocity(ends[batch]) for batch in self.held_out}
        self.power = torch.cat([_per_sample(v) for v in self.velocities.values()])
        self.end_gram = None if self.config.local else self._gram(ends)

    def chains_from(self, u: int) -> None:
        """One walk from u to the end: at block i the chains that end at i branch off, earlier ones go on."""
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
        """Starts the probe chain and the least-squares chain of the pair; local alignment ends here."""
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
        states = [self.store.get(name, batch, self.embedded[batch]) for batch in self._batches(name)]
        if kind == "probe":
            self.curves.cka[u, int(k) - u] = self._cka(self._gram(states), self.end_gram)
        else:
            errors = [self._velocity(s) - v for s, v in zip(states, self.velocities.values(), strict=True)]
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
            order = torch.rand(image.shape[:2], generator=generator).masked_fill(~state.real("image").cpu(), 2.0)
            places = order.argsort(1)[:, : self.config.tokens]
            rows.append(torch.gather(image, 1, places[..., None].expand(-1, -1, image.shape[-1]).to(image.device)))
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
