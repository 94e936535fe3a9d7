"""Probe: a residual linear map of every block and stream, T(x) ~ x + W x + b (paper, section 3.1).

Starts at the ridge solution over all batches (normal equations in float64), then, if asked,
trained on the same error as in the paper. A stream that nothing reads later is left out.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ...algorithms.least_squares import RIDGE_OF, NormalEquations, Solution
from ...models.streaming import StateStore, Teacher, room_for_states, sweep
from ...run import Run
from ...settings.prune_settings import ProbeConfig
from ...system.distributed import processes
from ...system.json_text import json_text
from ...system.progress import Progress
from ...system.tensor_files import TensorFile, write_tensors
from ..inputs import open_calibration, open_teacher


def probe(config: ProbeConfig) -> Path:
    """Writes `probes/block_NNN.safetensors`: `<stream>.weight` [d, d], `<stream>.bias` [d], and how
    well they fit.

    Blocks that are already there from the same settings are not fitted again.
    """
    run, teacher = Run(config.run), open_teacher(config)
    calibration = open_calibration(config, teacher.weights)
    calibration.split(config.held_out)
    numbers = [config.ridge, RIDGE_OF, config.train_steps, config.learning_rate, config.held_out]
    settings = json_text([calibration.hash, *numbers])
    store = StateStore(
        processes().folder(run.states / "probe") if config.streamed else None,
        room=room_for_states(),
    )
    own = set(processes().own(range(teacher.num_blocks)))
    with torch.no_grad():
        embedded = [teacher.embed(inputs) for inputs in calibration.all_inputs()]
        blocks = sweep(teacher, embedded, store, teacher.num_blocks - 1)
        for index, _, _ in Progress(blocks, total=teacher.num_blocks, desc="probe", unit="block"):
            if index in own and not _is_done(run.probe(index), settings):
                _fit_block(config, teacher, store, embedded, index, run.probe(index), settings)
    store.clear()
    return run.probes


def _is_done(path: Path, settings: str) -> bool:
    return path.exists() and TensorFile(path).metadata.get("settings") == settings


def _fit_block(
    config, teacher: Teacher, store, embedded, index: int, path: Path, settings: str
) -> None:
    tensors, report = {}, {}
    last_fit = len(embedded) - config.held_out
    for stream in teacher.used_streams(index):
        pairs = _Pairs(teacher, store, embedded, index, stream)
        solution = _ridge(pairs, range(last_fit), config.ridge)
        held_out = _error(pairs, range(last_fit, len(embedded)), solution.weight, solution.bias)
        weight, bias, trained = solution.weight, solution.bias, None
        if config.train_steps:
            candidate = _train(pairs, last_fit, solution, config)
            trained = _error(pairs, range(last_fit, len(embedded)), *candidate)
            if trained < held_out:
                weight, bias = candidate
        tensors |= {f"{stream}.weight": weight.float(), f"{stream}.bias": bias.float()}
        report[stream] = {
            **solution.report,
            "rank": solution.rank,
            "rows": solution.rows,
            "held_out": held_out,
            "held_out_trained": trained,
        }
    if processes().writes:
        write_tensors(path, tensors, {"settings": settings, "report": json_text(report)})


class _Pairs:
    """x and T(x) - x of one block's stream, real tokens only, batch by batch."""

    def __init__(self, teacher: Teacher, store: StateStore, embedded, index: int, stream: str):
        self.teacher, self.store, self.embedded = teacher, store, embedded
        self.index, self.stream = index, stream

    def __getitem__(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        like = self.embedded[batch]
        x = self.store.get(self.index, batch, like).real_tokens(self.stream)
        y = self.store.get(self.index + 1, batch, like).real_tokens(self.stream)
        return x.float(), y.float() - x.float()


def _ridge(pairs: _Pairs, batches: range, ridge: float) -> Solution:
    width = pairs.embedded[0].image.shape[-1]
    equations = NormalEquations(width, width, pairs.teacher.device)
    for batch in batches:
        equations.add(*pairs[batch])
    return equations.shared(processes().sum).solve(ridge, rank=True)


def _error(pairs: _Pairs, batches: range, weight: torch.Tensor, bias: torch.Tensor) -> float:
    """Squared error of x + W x + b, relative to the block's own step."""
    above = below = 0.0
    for batch in batches:
        x, step = pairs[batch]
        above += float((x @ weight.T.float() + bias.float() - step).square().sum())
        below += float(step.square().sum())
    above, below = processes().sum(torch.tensor([above, below], dtype=torch.float64)).tolist()
    return above / max(below, 1e-30)


def _train(
    pairs: _Pairs, batches: int, start: Solution, config: ProbeConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = start.weight.float().clone(), start.bias.float().clone()
    with torch.enable_grad():
        weight.requires_grad_(), bias.requires_grad_()
        optimizer = torch.optim.Adam([weight, bias], lr=config.learning_rate)
        for step in range(config.train_steps):
            x, target = pairs[step % batches]
            loss = (x @ weight.T + bias - target).square().sum() / processes().sum(
                target.square().sum()
            )
            optimizer.zero_grad()
            loss.backward()
            processes().sum_gradients((weight, bias), loss)
            optimizer.step()
    return weight.detach(), bias.detach()
