"""What each method chooses: a block that does nothing goes first; patterns have the number and
place they promise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.baselines import cka_sequential, cosine, hierarchical_prune, mse
from benchmarks.baselines.chain import Budget
from benchmarks.baselines.every_second import evenly_spaced
from benchmarks.baselines.random_contiguous import random_runs

from ...tiny.block_passes import count_passes
from .conftest import IDENTITY

CHOICES = {
    "cosine": cosine,
    "mse": mse,
    "cka_sequential": cka_sequential,
    "hierarchical_prune": hierarchical_prune,
}


@pytest.mark.parametrize("name", CHOICES)
def test_a_block_that_does_nothing_goes_first(name, planted):
    budget = Budget(100)
    with count_passes() as counted:
        assert CHOICES[name].select(planted, budget) == (IDENTITY,)
    assert counted.passes == budget.spent > 0


def test_early_blocks_are_not_eligible(planted):
    assert hierarchical_prune.select(planted, Budget(100), eligible_share=1 / 3) in {(4,), (5,)}
    assert hierarchical_prune.select(planted, Budget(100), eligible_share=1.0) == (IDENTITY,)


def test_scores_are_the_formulas():
    x, y = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [2.0, 0.0]])
    assert float(cosine.block_influence(x, y)) == pytest.approx(1 - (24 / 25 + 1) / 2)
    assert float(mse.relative_change(x, y)) == pytest.approx((1 + 1 + 1) / (25 + 1))


def test_what_is_frozen_and_what_is_not(task):
    pruned = hierarchical_prune.prune(task, Budget(300), removed=(2, 4))
    teacher = task.teacher

    def changed(module, original) -> set[str]:
        pairs = zip(module.named_parameters(), original.parameters(), strict=True)
        return {name.split(".")[0] for (name, p), q in pairs if not torch.equal(p, q)}

    assert changed(pruned.outer, teacher.outer) == {"norm_out", "proj_out"}
    assert [
        index for index, block in pruned.blocks.items() if changed(block, teacher.block(index))
    ] == [3, 5]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_evenly_spaced_blocks(data):
    num_blocks = data.draw(st.integers(3, 60))
    remove = data.draw(st.integers(1, num_blocks - 2))
    chosen = evenly_spaced(num_blocks, remove)
    assert len(set(chosen)) == remove and list(chosen) == sorted(chosen)
    assert chosen[0] >= 1 and chosen[-1] <= num_blocks - 2
    gaps = [b - a for a, b in zip(chosen, chosen[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    if num_blocks == 2 * remove + 2:
        assert set(gaps) <= {2}


def runs(removed) -> list[int]:
    """Lengths of the runs of neighbours."""
    lengths = []
    for previous, index in zip((None, *removed), removed, strict=False):
        if previous is not None and index == previous + 1:
            lengths[-1] += 1
        else:
            lengths.append(1)
    return lengths


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_random_runs(data):
    num_blocks, seed = data.draw(st.integers(4, 60)), data.draw(st.integers(0, 1000))
    remove = data.draw(st.integers(1, num_blocks - 2))
    if num_blocks - 2 - remove < math.ceil(remove / 4) - 1:
        with pytest.raises(ValueError, match="remove fewer"):
            random_runs(num_blocks, remove, seed)
        return
    removed = random_runs(num_blocks, remove, seed)
    assert len(removed) == remove and removed == random_runs(num_blocks, remove, seed)
    assert removed[0] >= 1 and removed[-1] <= num_blocks - 2
    assert all(2 <= length <= 4 for length in runs(removed)) or remove == 1


def test_random_runs_differ_by_seed_and_fill_the_range():
    many = {random_runs(12, 5, seed) for seed in range(200)}
    assert len(many) > 20 and {index for removed in many for index in removed} == set(range(1, 11))
    with pytest.raises(ValueError, match="cannot be removed"):
        evenly_spaced(6, 5)
