"""OneIG-Bench (Chang et al. 2025): `OneIG-Bench.csv` or `OneIG-Bench-ZH.csv` in its repository's folder,
whose `scripts/` have the questions, the texts and the answers.

Three of its five dimensions are judged: alignment (questions), text (words that are read) and
reasoning (how well the picture fits the answer). Style and diversity compare pictures with others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...system.atomic import read_object
from ...system.json_text import NotJSON, parse_json
from .dpg import in_order
from .items import Item, Question, csv_rows

QUESTIONS = {
    "Anime_Stylization": "anime",
    "Portrait": "human",
    "General_Object": "object",
    "Multilingualism": "multilingualism",
}
"""category -> name of the file with its questions"""
TEXT, REASONING = "Text_Rendering", "Knowledge_Reasoning"


def load(path: Path) -> list[Item]:
    chinese = path.stem.endswith("-ZH")
    prompt = "prompt_cn" if chinese else "prompt_en"
    files = _Files(path.parent / "scripts", "_zh" if chinese else "")
    return [
        Item(
            name=f"{row['category']} {row['id']}",
            prompt=row[prompt],
            **files.judged(row["category"], row["id"], where),
        )
        for where, row in csv_rows(path, ("category", "id", prompt))
    ]


class _Files:
    """The files beside the prompts, each read once it is asked for."""

    def __init__(self, folder: Path, ending: str):
        self.folder, self.ending = folder, ending
        self.tables: dict[str, dict] = {}

    def judged(self, category: str, name: str, where: str) -> dict:
        """The fields of an `Item` that say how it is judged."""
        if category in QUESTIONS:
            asked = self._entry(f"alignment/Q_D/{QUESTIONS[category]}{self.ending}.json", name)
            return {"category": "alignment", "questions": _questions(asked, where)}
        if category == TEXT:
            words = self._entry(f"text/text_content{self.ending}.csv", name)
            return {"category": "text", "words": words}
        if category == REASONING:
            answer = self._entry(f"reasoning/gt_answer{self.ending}.json", name)
            return {"category": "reasoning", "fits": str(answer)}
        raise ValueError(f"{where}: unknown category {category!r}")

    def _entry(self, file: str, name: str):
        path = self.folder / file
        if file not in self.tables:
            if not path.exists():
                raise ValueError(
                    f"{path} does not exist; give the csv in a copy of OneIG-Bench's repository"
                )
            self.tables[file] = _texts(path) if path.suffix == ".csv" else read_object(path)
        if name not in self.tables[file]:
            raise ValueError(f"{path} has no entry {name!r}; download the repository again")
        return self.tables[file][name]


def _texts(path: Path) -> dict[str, str]:
    return {row["id"]: row["text_content"] for _, row in csv_rows(path, ("id", "text_content"))}


def _questions(entry: dict, where: str) -> tuple[Question, ...]:
    """The authors keep both tables as objects or as JSON in a text."""
    try:
        texts, parents = (_table(entry[name]) for name in ("question", "dependency"))
        asked = {
            int(n): (str(text), [p for p in parents[n] if p], where) for n, text in texts.items()
        }
    except (AttributeError, KeyError, TypeError, NotJSON, ValueError):
        raise ValueError(f"{where}: its questions are not as OneIG-Bench has them") from None
    return in_order(asked)


def _table(value: Any) -> Any:
    return parse_json(value) if isinstance(value, str) else value
