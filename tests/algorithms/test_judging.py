"""Answers become figures by each benchmark's rule; scores are compared over the same prompts."""

from __future__ import annotations

import pytest
import torch

from ppcl_engine.algorithms.judging import Grade, answered, compared, lost_most, words_read
from ppcl_engine.algorithms.resampling import resampled_scores
from ppcl_engine.data.benchmarks.items import Item, Question

CHAIN = (Question(text="1"), Question(text="2", parents=(0,)), Question(text="3", parents=(1,)))


def item(rule: str) -> Item:
    return Item(name="a", prompt="a", category="a", questions=CHAIN, rule=rule)


@pytest.mark.parametrize(
    "rule, answers, figure",
    [
        ("share", (0.9, 0.6, 0.8), 1.0),
        ("share", (0.9, 0.2, 0.8), 1 / 3),  # the third makes no sense without the second
        ("share", (0.1, 0.9, 0.9), 1 / 3),  # parents are asked about their own answer alone
        ("all", (0.9, 0.9, 0.9), 1.0),
        ("all", (0.9, 0.9, 0.4), 0.0),
        ("product", (0.5, 0.5, 1.0), 0.25),
    ],
)
def test_answers_become_a_figure(rule, answers, figure):
    assert answered(item(rule), answers) == pytest.approx(figure)


@pytest.mark.parametrize(
    "wanted, read, right, words",
    [
        ("OPEN, daily! Don't wait", "dont open\nDAILY", 3, 4),
        ("sale sale", "SALE!", 1, 2),
        ("拥抱变化 2023年", "变化2023", 3, 6),
        ("a", "", 0, 1),
    ],
)
def test_words_are_counted_whatever_their_order(wanted, read, right, words):
    assert words_read(wanted, read) == (right, words)


def test_scores_are_resampled_within_categories():
    """As a loop over the same draws would have it."""
    generator = torch.Generator().manual_seed(1)
    earned, possible = torch.rand(2, 9, generator=generator), 1 + torch.rand(9, generator=generator)
    categories = torch.tensor([0, 1, 0, 2, 1, 0, 1, 2, 0])
    scores = resampled_scores(earned, possible, categories, seed=5, resamples=7)
    generator = torch.Generator().manual_seed(5)
    expected = torch.zeros(2, 8, dtype=torch.float64)
    for category in range(3):
        group = [i for i in range(9) if categories[i] == category]
        draws = torch.randint(len(group), (7, len(group)), generator=generator).tolist()
        for column, draw in enumerate([range(len(group)), *draws]):
            rows = [group[i] for i in draw]
            expected[:, column] += (
                earned[:, rows].double().sum(1) / possible[rows].double().sum() / 3
            )
    torch.testing.assert_close(scores, expected)


def grades(*earned: float) -> list[Grade]:
    return [Grade(earned=value, possible=2.0) for value in earned]


def test_a_difference_is_paired():
    """A variant that loses the same at every prompt has a difference without a width."""
    rows = {"full": grades(2, 1, 2, 1), "small": grades(1.8, 0.8, 1.8, 0.8)}
    result = compared(rows, ["a", "a", "b", "b"], seed=0)
    assert result["full"]["value"] == 0.75 and result["full"]["difference"] is None
    assert result["full"]["high"] - result["full"]["low"] > 0.1
    difference = result["small"]["difference"]
    assert difference == pytest.approx({"value": -0.1, "low": -0.1, "high": -0.1}, abs=1e-6)
    assert result["small"]["categories"] == pytest.approx({"a": 0.65, "b": 0.65}, abs=1e-6)


def test_the_prompts_that_lost_most_come_first():
    rows = {"full": grades(2, 2, 1, 2), "a": grades(2, 1, 1, 2), "b": grades(2, 2, 1, 0)}
    assert lost_most(rows, 3) == [3, 1]
