"""What a block costs, computed from shapes, is what its modules have and what a forward does."""

from __future__ import annotations

import pytest

from ppcl_engine.architectures import ARCHITECTURES
from ppcl_engine.models import cost as cost_module
from ppcl_engine.models.cost import CostModel
from ppcl_engine.models.layout import Place
from ppcl_engine.plan import Interval

from ..architectures.test_shapes import CASES

GRID, TEXT_TOKENS = (1, 3, 4), 5
COUNTED = [name for name, (a, config) in CASES.items() if config not in a.model_configs.values()]
LEFT_OUT = "qwen_image-1"  # a model with an additional condition, which no input of ours brings


def places(architecture, config) -> list[Place]:
    last = architecture.num_blocks(config) - 1
    students = [
        Interval(first=0, last=1, correction="affine"),
        Interval(first=0, last=1, correction="none"),
        Interval(first=last - 1, last=last, correction="4"),
    ]
    starts = {0, *(s.start for s in architecture.sections(config)), last}
    return [
        *(Place(index=index) for index in starts),
        *(Place(index=i.first, interval=i) for i in students),
    ]


@pytest.mark.parametrize("case", [name for name in COUNTED if name != LEFT_OUT])
def test_costs_are_those_of_the_blocks(case):
    architecture, config = CASES[case]
    references = ((1, 2, 2),) if config.get("zero_cond_t") else ()
    cost = CostModel(architecture, config, GRID, TEXT_TOKENS, references)
    for place in places(architecture, config):
        assert cost.place(place) == cost._built(place), place


def sorted_maps(cost: CostModel, place: Place, skip: tuple[str, ...]):
    return [sorted(map(tuple, pairs)) for pairs in cost.linear_maps(place, skip)]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
@pytest.mark.parametrize("skip", [(), ("to_q", "norm1.")], ids=["all", "some"])
def test_linear_maps_and_what_they_read_are_those_of_the_blocks(architecture, skip, monkeypatch):
    config = architecture.tiny_config
    cost = CostModel(architecture, config, GRID, TEXT_TOKENS)
    computed = {place: sorted_maps(cost, place, skip) for place in places(architecture, config)}
    monkeypatch.setattr(cost_module, "folding_of", lambda config: "the blocks are built")
    for place, maps in computed.items():
        assert maps == sorted_maps(cost, place, skip), place
    assert cost.largest_map(Place(index=0)) == max(
        rows * columns for rows, columns in cost.linear_maps(Place(index=0))[0]
    )
