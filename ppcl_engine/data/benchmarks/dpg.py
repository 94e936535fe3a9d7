"""DPG-Bench (Hu et al. 2024, ELLA): long prompts, each with questions that depend on each other.

`dpg_bench.csv` has a row a question; prompts are drawn from `prompts/ITEM.txt` beside it, where that
folder is.
"""

from __future__ import annotations

from pathlib import Path

from ...system.texts import read_text
from .items import Item, Question, csv_rows

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "question_natural_language")


def load(path: Path) -> list[Item]:
    questions: dict[str, dict[int, tuple[str, list[int], str]]] = {}
    texts: dict[str, str] = {}
    for where, row in csv_rows(path, COLUMNS):
        try:
            number = int(row["proposition_id"])
            parents = [int(part) for part in row["dependency"].split(",")]
        except ValueError:
            raise ValueError(
                f"{where}: proposition_id {row['proposition_id']!r} or dependency "
                f"{row['dependency']!r} is not a number"
            ) from None
        item = row["item_id"]
        texts.setdefault(item, row["text"])
        asked = questions.setdefault(item, {})
        asked[number] = row["question_natural_language"], [p for p in parents if p], where
    return [
        Item(
            name=item,
            prompt=_prompt(path, item, texts[item]),
            category="dpg",
            questions=in_order(asked),
        )
        for item, asked in questions.items()
    ]


def in_order(asked: dict[int, tuple[str, list[int], str]]) -> tuple[Question, ...]:
    """Questions by their numbers, (text, numbers of the parents, where it stands) each. Raises
    ValueError for a parent that is not there."""
    places = {number: place for place, number in enumerate(asked)}
    for _, parents, where in asked.values():
        if absent := [parent for parent in parents if parent not in places]:
            raise ValueError(f"{where} depends on question {absent[0]}, which its prompt lacks")
    return tuple(
        Question(text=text, parents=tuple(places[parent] for parent in parents))
        for text, parents, _ in asked.values()
    )


def _prompt(path: Path, item: str, text: str) -> str:
    folder = path.parent / "prompts"
    return read_text(folder / f"{item}.txt").strip() if folder.is_dir() else text.strip()
