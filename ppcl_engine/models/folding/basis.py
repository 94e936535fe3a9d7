"""The mathematics of folding a modulation y(t) = W s(t) + b, s(t) = silu(conditioning of timestep
t), into fewer inputs.

basis: s(t) ~ P P^T s(t) with orthonormal columns P, so y(t) ~ (W P) (P^T s(t)) + b. Linear in W:
any change dW, of low rank or not, becomes dW P. table: y at some timesteps, as the model itself
computes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from ...system.finite import BAD_MODEL, check_finite

RANKS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# how many t in [0, 1] a basis is made from (the embedding's fastest period is 0.0063), and how many
# others its error is measured at
TIMES, TIMES_BETWEEN = 1025, 401
ROWS_AT_ONCE = 1024
MARK_ROWS, MARKED = 4, (".weight", ".bias")


def directions(inputs: torch.Tensor, rank: int) -> torch.Tensor:
    """inputs [timesteps, width] -> orthonormal [width, 1 + rank]: the mean's direction, then the
    `rank` leading ones of the rest (Eckart and Young 1936).

    Float64 inside. Raises ValueError for inputs that are not finite.
    """
    check_finite({"time embedding": inputs}, "the model", BAD_MODEL)
    inputs = inputs.double()
    mean = inputs.mean(dim=0)
    first = mean / mean.norm()
    rest = inputs - torch.outer(inputs @ first, first)
    leading = torch.linalg.svd(rest, full_matrices=False).Vh[:rank]
    return torch.cat([first[:, None], leading.T], dim=1)


def useful_ranks(width: int) -> tuple[int, ...]:
    """The ranks that leave at most half of a modulation's weights."""
    return tuple(rank for rank in RANKS if 2 * (rank + 1) <= width)


@torch.no_grad()
def errors_by_rank(
    weight: torch.Tensor,
    bias: torch.Tensor,
    inputs: torch.Tensor,
    basis: torch.Tensor,
    ranks: Sequence[int],
) -> torch.Tensor:
    """| y_rank(t) - y(t) | / | y(t) | [ranks, timesteps].

    weight [outputs, width], inputs [timesteps, width]; basis from `directions`: its first 1 + rank
    columns are the basis of that rank.
    """
    inputs, basis = inputs.float(), basis.float()
    coefficients = inputs @ basis
    errors, power = torch.zeros(len(ranks), len(inputs)), torch.zeros(len(inputs))
    for rows, offset in zip(weight.split(ROWS_AT_ONCE), bias.split(ROWS_AT_ONCE), strict=True):
        rows = rows.float()
        left, folded, done = inputs @ rows.T, (rows @ basis).T, 0
        power += (left + offset.float()).square().sum(dim=1).cpu()
        for place, rank in enumerate(ranks):
            left -= coefficients[:, done : rank + 1] @ folded[done : rank + 1]
            errors[place] += left.square().sum(dim=1).cpu()
            done = rank + 1
    return (errors / power).sqrt()


InputsAt = Callable[[torch.Tensor, torch.dtype], torch.Tensor]
"""(timesteps, precision) -> s(t) [timesteps, width] in float32, as a model of that precision
computes it"""


class TimeBasis:
    """The directions that the outputs of one time embedder span, and the outputs on which every
    rank's error is measured: at timesteps in between, in both precisions."""

    def __init__(self, inputs_at: InputsAt, ranks: tuple[int, ...], device: str | torch.device):
        self.ranks, self.device = ranks, device
        made_of = inputs_at(torch.linspace(0, 1, TIMES), torch.float32)
        self.directions = directions(made_of, ranks[-1]).to(device, torch.float32)
        between = torch.linspace(0, 1, TIMES_BETWEEN)
        self.measured_on = torch.cat(
            [inputs_at(between, dtype) for dtype in (torch.float32, torch.bfloat16)]
        )

    def of_rank(self, rank: int) -> torch.Tensor:
        """[width, 1 + rank]"""
        return self.directions[:, : 1 + rank]

    def errors(self, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """The errors of a modulation folded with each of the ranks, as in `errors_by_rank`."""
        weight, bias = weight.to(self.device), bias.to(self.device)
        return errors_by_rank(weight, bias, self.measured_on, self.directions, self.ranks)

    def folded(self, weight: torch.Tensor, rank: int) -> torch.Tensor:
        """A modulation's weight [outputs, width] as a map of its coefficients [outputs, 1 +
        rank]."""
        return project(weight.to(self.device), self.of_rank(rank))


@dataclass
class Curve:
    """Error against rank over all modulations."""

    ranks: tuple[int, ...]
    """the useful ones"""
    by_part: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """name of a modulation -> (mean, worst) over t of its errors, [ranks] each"""

    def add(self, name: str, errors: torch.Tensor) -> None:
        """Raises ValueError for errors that are not finite, as damaged weights give."""
        check_finite({name: errors}, "the model", BAD_MODEL)
        self.by_part[name] = errors.mean(dim=1), errors.amax(dim=1)

    @property
    def mean(self) -> torch.Tensor:
        return torch.stack([mean for mean, _ in self.by_part.values()]).mean(dim=0)

    @property
    def worst(self) -> torch.Tensor:
        return torch.stack([worst for _, worst in self.by_part.values()]).amax(dim=0)

    def worst_part(self, rank: int) -> str:
        place = self.ranks.index(rank)
        return max(self.by_part, key=lambda name: float(self.by_part[name][1][place]))

    def smallest_rank(self, bound: float) -> int:
        """The smallest useful rank whose worst error is within `bound`. Raises ValueError where
        there is none."""
        for rank, worst in zip(self.ranks, self.worst.tolist(), strict=True):
            if worst <= bound:
                return rank
        raise ValueError(
            f"no useful rank keeps the error within {bound:g}: rank {self.ranks[-1]} leaves {self.worst[-1]:.2g} at worst "
            f"(in {self.worst_part(self.ranks[-1])}); fold with form table, which has no error, or allow more"
        )

    def to_json(self) -> dict:
        rows = zip(self.ranks, self.mean.tolist(), self.worst.tolist(), strict=True)
        return {
            "curve": [{"rank": rank, "mean": mean, "worst": worst} for rank, mean, worst in rows]
        }


@torch.no_grad()
def project(weight: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """W P [outputs, inputs], in float32"""
    return torch.cat([rows.float() @ basis.float() for rows in weight.split(ROWS_AT_ONCE)])


Conditionings = dict[int, torch.Tensor]
"""rows that a modulation sees at once -> conditioning [timesteps, rows, width], as the model makes
it for that many"""


@torch.no_grad()
def values_at(
    modulation: Callable[[torch.Tensor], torch.Tensor], conditionings: Conditionings
) -> torch.Tensor:
    """What the modulation returns for each timestep [outputs, timesteps * batches].

    Computed by the very calls of a forward, because a kernel's last bits depend on how many rows it
    gets.
    """
    columns = [modulation(rows)[0] for given in conditionings.values() for rows in given]
    return torch.stack(columns, dim=1)


def mark_of(names: Iterable[str], read: Callable[[str, int | None], torch.Tensor]) -> str:
    """A hash that tells one model's modulations from another's, also where a LoRA was merged: of
    shapes, precision, the first rows of each weight, and each whole bias.

    `read(name of a tensor, rows)` returns its first rows, as stored.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        rows = read(name, MARK_ROWS if name.endswith(".weight") else None).contiguous()
        digest.update(f"{name}{tuple(rows.shape)}{rows.dtype}".encode())
        digest.update(rows.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
