"""Small modules that replace modulations which read only the timestep.

Such a modulation is W silu(c(t)) + b: its values can be kept in a table, or computed from a few
coefficients. The time embedder appends to the conditioning what a block then needs: the timestep's
row in a table (one-hot), or its coefficients in a basis. So the block's own forward runs unchanged,
no extra argument is passed along, and every state knows its own timesteps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import nn

from .modules import AnyModule

FOLDING = "folding"
"""the configuration's entry for it"""
FORMS = ("table", "basis")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_INPUTS = 4096  # ten times any schedule: a hostile file must not make a host build more
SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class Folding:
    """What a configuration says of a folded model."""

    form: str
    """ "table" or "basis" """
    inputs: int
    """timesteps of the table, or columns of the basis"""
    batches: tuple[int, ...] = (1,)
    """table: for which numbers of rows at once its values are bit for bit; each has `inputs`
    columns"""
    precision: str = "float32"
    """table: the precision in which its model is given timesteps"""
    mark: str = ""
    """hash of the original modulations (`models.folding.basis.mark_of`)"""

    def __post_init__(self):
        if (
            self.form not in FORMS
            or type(self.inputs) is not int
            or not 0 <= self.inputs <= MOST_INPUTS
        ):
            raise ValueError(
                f"folding {self.form!r} with {self.inputs!r} inputs is unknown; known forms: {', '.join(FORMS)}, with 0 to {MOST_INPUTS} inputs"
            )
        if not self.batches or any(
            type(rows) is not int or not 1 <= rows <= MOST_INPUTS for rows in self.batches
        ):
            raise ValueError(
                f"the folding's batches {self.batches!r} are not whole numbers from 1 to {MOST_INPUTS}; fold the model again"
            )
        if not isinstance(self.mark, str):
            raise ValueError(f"the folding's mark {self.mark!r} is not text; fold the model again")
        if not isinstance(self.precision, str) or self.precision not in PRECISIONS:
            raise ValueError(
                f"the folding's precision {self.precision!r} is unknown; known: {', '.join(PRECISIONS)}"
            )

    @property
    def columns(self) -> int:
        return self.inputs * (len(self.batches) if self.form == "table" else 1)

    def to_config(self) -> dict:
        return {**asdict(self), "batches": list(self.batches)}


def folding_of(config: dict) -> Folding | None:
    """None: nothing is folded. Raises ValueError for an entry that does not describe a folding."""
    values = config.get(FOLDING)
    if values is None:
        return None
    shaped = isinstance(values, dict) and values.keys() <= Folding.__dataclass_fields__.keys()
    if (
        not shaped
        or not {"form", "inputs"} <= values.keys()
        or not isinstance(values.get("batches", ()), list | tuple)
    ):
        raise ValueError(
            f"the configuration's folding {values!r} is not readable; fold the model again"
        )
    return Folding(**{**values, "batches": tuple(values.get("batches", (1,)))})


def unfolded_config(config: dict) -> dict:
    return {name: value for name, value in config.items() if name != FOLDING}


class BasisInputs(nn.Module):
    """Coefficients of silu(conditioning) in orthonormal `directions` [width, inputs].

    In two parts, the second being what the first loses by rounding to the conditioning's precision:
    results need these digits, and they cost nothing.
    """

    def __init__(self, width: int, inputs: int):
        super().__init__()
        self.directions: torch.Tensor
        self.register_buffer("directions", torch.zeros(width, inputs))

    def forward(self, timestep: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        with without_autocast(conditioning):
            exact = F.silu(conditioning.float()) @ self.directions.to(
                conditioning.device, torch.float32
            )
            high = exact.to(conditioning.dtype)
            return torch.cat([high, (exact - high).to(conditioning.dtype)], dim=-1)


class TableInputs(nn.Module):
    """The column of each timestep in `timesteps` [inputs], one-hot.

    `more` adds missing timesteps to the model, see `models.folding.reading.give_base`; None: a
    timestep that is missing raises ValueError.
    """

    def __init__(self, inputs: int, precision: torch.dtype = torch.float32):
        super().__init__()
        self.timesteps: torch.Tensor
        self.register_buffer("timesteps", torch.zeros(inputs))
        self.precision = precision
        self.more: Callable[[list[float]], None] | None = None

    def forward(self, timestep: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        if timestep.is_meta:
            return conditioning.new_zeros(len(timestep), len(self.timesteps))
        one_hot = self.one_hot_columns(timestep)
        if not bool(one_hot.any(dim=1).all()):
            self.ask(timestep[~one_hot.any(dim=1)].float().tolist())
            one_hot = self.one_hot_columns(timestep)
        return one_hot.to(conditioning.dtype)

    def one_hot_columns(self, timestep: torch.Tensor) -> torch.Tensor:
        """Which column each timestep is in: bool [n, inputs]."""
        return torch.eq(
            timestep.float()[:, None], self.timesteps.to(timestep.device, torch.float32)
        )

    def ask(self, missing: list[float]) -> None:
        if self.more is None:
            refuse_timesteps(missing, self.timesteps.tolist(), self.precision)
        self.more(list(dict.fromkeys(missing)))


def refuse_timesteps(missing: list[float], known: list[float], precision: torch.dtype) -> NoReturn:
    raise ValueError(
        f"the model's table has no timestep {_listed(missing)}, and no base file is given; it has {_listed(known)} in "
        f"{str(precision).removeprefix('torch.')}: give the file that it was folded from as base, keep to its schedule and "
        "precision, or fold with form basis"
    )


def _listed(timesteps: list[float]) -> str:
    """ "1, 0.95 and 18 more" """
    unique = list(dict.fromkeys(timesteps))
    more = f" and {len(unique) - SHOWN} more" if len(unique) > SHOWN else ""
    return (", ".join(f"{t:.6g}" for t in unique[:SHOWN]) or "none") + more


class Carried(nn.Module):
    """Replaces a modulation's activation: returns what the conditioning carries behind its own
    `width` values."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        return conditioning[..., self.width :]


class BasisMap(nn.Linear):
    """A modulation's linear map on the basis' coefficients; computed in float32 whatever it is
    stored in."""

    def forward(self, carried: torch.Tensor) -> torch.Tensor:
        with without_autocast(carried):
            return F.linear(coefficients(carried), self.weight.float(), self.bias.float()).to(
                carried.dtype
            )


class TableMap(nn.Linear):
    """A modulation's values themselves, one column a timestep; columns for other numbers of rows
    follow."""

    def __init__(self, inputs: int, outputs: int, batches: tuple[int, ...], **options):
        super().__init__(inputs * len(batches), outputs, bias=False, **options)
        self.batches = batches

    def forward(self, carried: torch.Tensor) -> torch.Tensor:
        return picked(self.weight, carried, self.batches).to(carried.dtype)


def coefficients(carried: torch.Tensor) -> torch.Tensor:
    high, low = carried.float().chunk(2, dim=-1)
    return high + low


def picked(table: torch.Tensor, carried: torch.Tensor, batches: tuple[int, ...]) -> torch.Tensor:
    """The columns of `table` [outputs, timesteps * batches] that the one-hot `carried` [rows,
    timesteps] names.

    They are copied, not computed. Uses the columns made for this many rows at once where there are
    some; for other numbers of rows the values differ by rounding.
    """
    rows, inputs = carried.shape
    first = inputs * batches.index(rows) if rows in batches else 0
    # [rows, outputs], contiguous as a linear map returns it
    return table.index_select(1, first + carried.argmax(dim=-1)).t().contiguous()


def without_autocast(like: torch.Tensor):
    return torch.autocast(like.device.type if not like.is_meta else "cpu", enabled=False)


def fold_block(
    block: AnyModule, modulations: tuple[str, ...], width: int, folding: Folding
) -> nn.Module:
    """The block with small maps in place of its modulations' linear maps ("img_mod.1", behind the
    activation "img_mod.0")."""
    for name in modulations:
        parent, index = name.rsplit(".", 1)
        sequence = block.get_submodule(parent)
        linear = sequence[int(index)]
        sequence[0], sequence[int(index)] = Carried(width), folded_map(linear, folding)
    return block


def folded_map(linear: nn.Linear, folding: Folding) -> nn.Linear:
    options = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    if folding.form == "table":
        return TableMap(folding.inputs, linear.out_features, folding.batches, **options)
    return BasisMap(folding.inputs, linear.out_features, **options)


def fold_embedder(embedder: AnyModule, last: AnyModule, width: int, folding: Folding) -> None:
    """The time embedder appends what the blocks need; the final layer, which also reads the
    conditioning, does not see it."""
    if folding.form == "basis":
        embedder.folding = BasisInputs(width, folding.inputs)
    else:
        embedder.folding = TableInputs(folding.inputs, PRECISIONS[folding.precision])
    embedder.register_forward_hook(append_carried)
    last.register_forward_pre_hook(partial(drop_carried, width))


def append_carried(
    embedder: AnyModule, arguments: tuple, conditioning: torch.Tensor
) -> torch.Tensor:
    return torch.cat([conditioning, embedder.folding(arguments[0], conditioning)], dim=-1)


def drop_carried(width: int, last: AnyModule, arguments: tuple) -> tuple:
    return (arguments[0], arguments[1][..., :width], *arguments[2:])


def first_half(linear: nn.Linear) -> nn.Linear:
    """A copy of a linear map that returns the first half of its outputs, with tensors of its
    own."""
    half = copy.copy(linear)
    half.out_features = linear.out_features // 2
    half._parameters = {
        name: None
        if p is None
        else nn.Parameter(p.detach()[: half.out_features].clone(), p.requires_grad)
        for name, p in linear._parameters.items()
    }
    return half


def known_timesteps(model: AnyModule, timesteps: Iterable[float]) -> None:
    """Adds the timesteps that a table model lacks from its base file, in one pass before sampling.

    Without it every missing timestep costs a pass of its own. Other models are left alone. Raises
    ValueError, in one line, where there is no base file.
    """
    inputs = table_inputs(model)
    if inputs is None:
        return
    wanted = torch.tensor(list(timesteps)).to(inputs.precision).float().tolist()
    known = inputs.timesteps.float().tolist()
    if missing := [t for t in dict.fromkeys(wanted) if t not in known]:
        inputs.ask(missing)


def table_inputs(model: AnyModule) -> TableInputs | None:
    return next((module for module in model.modules() if isinstance(module, TableInputs)), None)


def table_maps(model: AnyModule, kind: type = TableMap) -> dict[str, AnyModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}
