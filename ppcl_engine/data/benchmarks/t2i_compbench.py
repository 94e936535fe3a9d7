"""T2I-CompBench (Huang et al. 2023): a text file a category, one prompt a line.

Give one file, such as `color_val.txt`, or the folder `examples/dataset` for all of its `*_val.txt`.
"""

from __future__ import annotations

import re
from pathlib import Path

from ...system.texts import lines_of, read_text
from .items import Item, Question

ATTRIBUTES = ("color", "shape", "texture")
"""a question for each "and"-part of the prompt, as for the authors' noun phrases"""
WHOLE = ("spatial", "3d_spatial", "numeracy", "complex")
FITTING = ("non_spatial",)
CATEGORIES = (*ATTRIBUTES, *WHOLE, *FITTING)
ENDING = re.compile(r"_(val|train)(_\w+)?$")


def load(path: Path) -> list[Item]:
    files = [path / f"{name}_val.txt" for name in CATEGORIES] if path.is_dir() else [path]
    there = [file for file in files if file.exists() or file == path]
    if not there:
        raise ValueError(f"{path} has none of the files {CATEGORIES[0]}_val.txt and so on")
    return [item for file in there for item in _items(file)]


def _items(file: Path) -> list[Item]:
    category = ENDING.sub("", file.stem)
    if category not in CATEGORIES:
        raise ValueError(
            f"{file} does not name a category of T2I-CompBench; known: {', '.join(CATEGORIES)}"
        )
    lines = [line.strip() for line in lines_of(read_text(file))]
    return [
        _item(category, f"{category} {number}", line)
        for number, line in enumerate(lines, 1)
        if line
    ]


def _item(category: str, name: str, prompt: str) -> Item:
    if category in FITTING:
        return Item(name=name, prompt=prompt, category=category, fits=prompt)
    parts = re.split(r" and |, ", prompt) if category in ATTRIBUTES else [prompt]
    questions = tuple(
        Question(text=f"Does this picture show {part.strip().rstrip('.')}?") for part in parts
    )
    return Item(name=name, prompt=prompt, category=category, questions=questions, rule="product")
