"""GenEval (Ghosh et al. 2023): objects, their number, colour and place, in `evaluation_metadata.jsonl`.

The authors detect objects; here the same conditions are asked one by one, and all must hold.
"""

from __future__ import annotations

from pathlib import Path

from .items import Item, Question, json_lines

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
FIELDS = {"tag": str, "include": list, "prompt": str}


def load(path: Path) -> list[Item]:
    return [
        Item(
            name=str(number),
            prompt=row["prompt"],
            category=row["tag"],
            questions=_questions(row, where),
            rule="all",
        )
        for number, (where, row) in enumerate(json_lines(path, FIELDS))
    ]


def _questions(row: dict, where: str) -> tuple[Question, ...]:
    """A question for each object, and one for each place. Raises ValueError where an object is not
    described as GenEval's are."""
    objects, texts = row["include"], []
    for wanted in objects:
        try:
            texts.append(_presence(wanted["class"], wanted["count"], wanted.get("color")))
            if "position" in wanted:
                place, other = wanted["position"]
                texts.append(_position(wanted["class"], place, objects[other]["class"]))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise ValueError(
                f"{where}: 'include' does not give class, count and position as GenEval does"
            ) from None
    return tuple(Question(text=text) for text in texts)


def _presence(name: str, count: int, colour: str | None) -> str:
    described = f"{colour} {name}" if colour else name
    if count == 1:
        return f"Is there {_with_article(described)} in this picture?"
    plural = f"{described}es" if described.endswith("s") else f"{described}s"
    return f"Are there exactly {NUMBERS[count]} {plural} in this picture?"


def _position(name: str, place: str, other: str) -> str:
    towards = f"to the {place}" if place.endswith(" of") else place
    return f"Is the {name} {towards} the {other} in this picture?"


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
