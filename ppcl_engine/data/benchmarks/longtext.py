"""LongText-Bench (Geng et al. 2025, X-Omni): pictures with much text, in `text_prompts.jsonl` or
`text_prompts_zh.jsonl`. The score is the share of the words (Chinese: characters) that are read."""

from __future__ import annotations

from pathlib import Path

from .items import Item, json_lines

FIELDS = {"prompt": str, "text": (list, str)}


def load(path: Path) -> list[Item]:
    items = []
    for number, (_, row) in enumerate(json_lines(path, FIELDS)):
        lines = [row["text"]] if isinstance(row["text"], str) else row["text"]
        words = " ".join(map(str, lines))
        name = str(row.get("prompt_id", number))
        items.append(Item(name=name, prompt=row["prompt"], category="longtext", words=words))
    return items
