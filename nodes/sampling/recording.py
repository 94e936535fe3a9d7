"""What a sampler feeds a model, kept as a calibration set. Does not call ComfyUI.

A few states of every picture are kept, spread over the schedule: most with the prompt, some with the
negative prompt. The finished picture, as latents, becomes the clean end of each. An edit model's
references are kept with every state.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ...ppcl_engine.architectures import Architecture, Inputs
from ...ppcl_engine.data.calibration import CalibrationSet, load_calibration, save_calibration
from ...ppcl_engine.data.sampling import inputs_of
from ...ppcl_engine.system.seeds import draw_generator


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is recorded."""

    samples: int
    """in the whole set"""
    each_picture: int
    """samples of one picture"""
    batch: int
    """samples that go through a block at once"""
    empty_captions: float
    """share of samples with the negative prompt"""
    seed: int
    """of the choice of samples"""


TEXT, MASK = "encoder_hidden_states", "encoder_hidden_states_mask"
Wanted = dict[tuple[int, int], bool]
"""(row, step) -> whether the negative prompt's state is wanted"""


def wanted_states(limits: Limits, number: int, rows: int, steps: int) -> Wanted:
    """For each row, one random state in each of `each_picture` equal parts of the schedule. The same
    seed and number of the sampling give the same choice."""
    generator, wanted = _generator(limits, number), {}
    kept = min(limits.each_picture, steps)
    for row in range(rows):
        positions = (torch.arange(kept) + torch.rand(kept, generator=generator)) / kept * steps
        negative = torch.rand(kept, generator=generator) < limits.empty_captions
        wanted |= {
            (row, step): empty
            for step, empty in zip(positions.int().tolist(), negative.tolist(), strict=True)
        }
    return wanted


def _generator(limits: Limits, number: int) -> torch.Generator:
    return draw_generator(limits.seed, number)


@dataclass(frozen=True)
class State:
    """One row of a forward, on the CPU in float32."""

    latents: torch.Tensor
    """[1, channels, height, width]"""
    t: float
    captions: Inputs
    """what the model reads beside the latents, by diffusers' names: text [tokens, width], mask
    [tokens], pooled text [width], guidance [], tokens of all references [tokens, channels]"""
    negative: bool
    """whether the prompt is the negative one"""
    references: tuple[tuple[int, ...], ...]
    """size of each reference in tokens (frames, rows, columns)"""

    @property
    def tokens(self) -> int:
        return len(self.captions[TEXT])


class Sampling:
    """The states kept of one sampling while it runs."""

    def __init__(self, limits: Limits, number: int, rows: int, steps: int):
        self.limits, self.number, self.rows, self.steps = limits, number, rows, steps
        self.wanted = wanted_states(limits, number, rows, steps)
        self.states: dict[tuple[int, int], State] = {}

    def see(
        self,
        step: int,
        negative: bool,
        latents: torch.Tensor,
        t: torch.Tensor,
        captions: Inputs,
        references=(),
    ) -> None:
        """Keeps what is wanted of the rows of one prompt in a forward: latents [rows, channels,
        height, width], t [rows], captions and references as in `State`, one row each.

        Only the first forward of a step counts. A state with the other prompt is kept until one with
        the wanted prompt comes, which never happens at guidance 1.
        """
        for row in range(self.rows):
            kept = self.states.get((row, step))
            if (row, step) not in self.wanted or (kept and kept.negative == self.wanted[row, step]):
                continue
            if kept is None or negative == self.wanted[row, step]:
                own = {name: _copied(tensor[row]) for name, tensor in captions.items()}
                self.states[row, step] = State(
                    _copied(latents[row])[None], float(t[row]), own, negative, references
                )

    def batches(self, architecture: Architecture, clean: torch.Tensor, most: int) -> list[Inputs]:
        """At most `most` of the samples, shuffled, in batches. Within a batch, references have the
        same sizes, and texts the same length unless a mask allows padding. clean: the finished
        pictures [rows, channels, height, width]."""
        keys = sorted(self.states)
        order = torch.randperm(len(keys), generator=_generator(self.limits, self.number))[:most]
        keys = [keys[position] for position in order.tolist()]
        clean = clean.float().cpu()
        chunks, alike = [], {}
        for key in keys:
            length = 0 if MASK in architecture.caption_inputs else self.states[key].tokens
            shape = (length, self.states[key].references)
            if len(chunk := alike.setdefault(shape, [])) == 0:
                chunks.append(chunk)
            chunk.append(key)
            if len(chunk) == self.limits.batch:
                del alike[shape]
        return [self._batch(architecture, clean, chunk) for chunk in chunks]

    def _batch(
        self, architecture: Architecture, clean: torch.Tensor, keys: list[tuple[int, int]]
    ) -> Inputs:
        states = [self.states[key] for key in keys]
        latents = torch.cat([state.latents for state in states])
        ends = architecture.pack(clean[[row for row, _ in keys]])
        t = torch.tensor([state.t for state in states])
        captions = {
            name: _stacked([state.captions[name] for state in states])
            for name in states[0].captions
        }
        grid = torch.cat(
            [architecture.grid(latents), torch.tensor(states[0].references).reshape(-1, 3).long()]
        )
        return inputs_of(architecture.pack(latents), t, captions, grid, ends)


def _stacked(rows: list[torch.Tensor]) -> torch.Tensor:
    """Rows stacked, padded with zeros if their first dimensions differ."""
    return (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        if rows[0].ndim
        else torch.stack(rows)
    )


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(
        "cpu", torch.bool if tensor.dtype == torch.bool else torch.float32, copy=True
    )


def recorded(path: Path, origin: dict) -> CalibrationSet:
    """What was recorded so far. Raises ValueError if the file is from another recording."""
    if not path.exists():
        return CalibrationSet([], origin)
    calibration = load_calibration(path)
    if calibration.origin != origin:
        raise ValueError(
            f"{path} was recorded with other settings; delete its folder, or change seed"
        )
    return calibration


def append(path: Path, origin: dict, batches: list[Inputs]) -> CalibrationSet:
    """Adds batches to the set and writes it; the file is replaced as a whole."""
    grown = CalibrationSet([*recorded(path, origin).batches, *batches], origin)
    save_calibration(path, grown)
    return grown
