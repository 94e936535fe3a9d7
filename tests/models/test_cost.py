"""What a block costs, computed from shapes, is what its modules have and what a forward does."""

from __future__ import annotations

import pytest

from ppcl_engine.architectures import ARCHITECTURES
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


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_the_largest_map_is_one_of_the_blocks(architecture):
    cost = CostModel(architecture, architecture.tiny_config, GRID, TEXT_TOKENS)
    maps, _ = cost.linear_maps(Place(index=0))
    assert cost.largest_map(Place(index=0)) == max(rows * columns for rows, columns in maps)
