"""How a picture's answers become a figure, and figures of prompts a benchmark's score."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..data.benchmarks.items import Item
from ..data.graders.base import Grader
from .resampling import resampled_scores, spread_estimate

if TYPE_CHECKING:
    from PIL.Image import Image

YES = 0.5  # from this probability on, an answer is yes
TOKEN = re.compile(r"[\u4e00-\u9fff]|[^\s\u4e00-\u9fff]+")
"""a Chinese character, or a word of other scripts"""


@dataclass(frozen=True, kw_only=True)
class Grade:
    """What a picture earned of what it could."""

    earned: float
    possible: float
    """1; for words to read, their number"""


def grade(item: Item, image: Image, grader: Grader) -> Grade:
    if item.needs == "ask":
        answers = [grader.ask(image, question.text) for question in item.questions]
        return Grade(earned=answered(item, answers), possible=1.0)
    if item.needs == "read":
        right, words = words_read(item.words, grader.read(image))
        return Grade(earned=float(right), possible=float(words))
    return Grade(earned=grader.similarity(image, item.fits), possible=1.0)


def answered(item: Item, answers: Sequence[float]) -> float:
    """Probabilities of yes -> the item's figure, by its rule. Where a question's parents are
    answered with no, its own answer counts as no."""
    if item.rule == "product":
        return float(torch.tensor(answers, dtype=torch.float64).prod())
    yes = [answer >= YES for answer in answers]
    right = [
        said and all(yes[parent] for parent in question.parents)
        for said, question in zip(yes, item.questions, strict=True)
    ]
    return float(all(right)) if item.rule == "all" else sum(right) / len(right)


def words_read(wanted: str, read: str) -> tuple[int, int]:
    """(how many of the wanted words were read, how many there are), without regard to their order,
    punctuation and case."""
    there, found = Counter(tokens(wanted)), Counter(tokens(read))
    return (there & found).total(), there.total()


def tokens(text: str) -> list[str]:
    return TOKEN.findall(re.sub(r"[^\w\s]|_", "", text.lower()))


def compared(
    grades: dict[str, list[Grade]], categories: Sequence[str], seed: int
) -> dict[str, dict]:
    """Variant -> its score, the difference from the first variant, the teacher, and the score of each
    category, as result files have them. All variants are resampled by the same prompts."""
    names = sorted(set(categories))
    numbers = torch.tensor([names.index(category) for category in categories])
    earned = torch.tensor([[g.earned for g in rows] for rows in grades.values()])
    possible = torch.tensor([g.possible for g in next(iter(grades.values()))])
    scores = resampled_scores(earned, possible, numbers, seed)
    return {
        variant: {
            **spread_estimate(scores[row]),
            "difference": spread_estimate(scores[row] - scores[0]) if row else None,
            "categories": {
                name: float(earned[row, numbers == n].sum() / possible[numbers == n].sum())
                for n, name in enumerate(names)
            },
        }
        for row, variant in enumerate(grades)
    }


def lost_most(grades: dict[str, list[Grade]], most: int) -> list[int]:
    """The prompts at which the variants lost most against the teacher, the first of `grades`, in
    the mean; none at which they lost nothing."""
    shares = torch.tensor([[g.earned / g.possible for g in rows] for rows in grades.values()])
    lost = shares[0] - shares[1:].mean(0)
    order = lost.argsort(descending=True, stable=True)[:most].tolist()
    return [place for place in order if lost[place] > 0]
