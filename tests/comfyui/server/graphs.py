"""Workflows in API form: the shipped ones, with settings for seconds; and a graph that is put
together node by node."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path

WORKFLOWS = Path(__file__).resolve().parents[3] / "workflows"
TEACHER = "demo/teacher.safetensors"
CAPTIONS = "\n".join(
    f"a {colour} {character} on a {ground} circle, green background"
    for colour, ground, character in (
        ("red", "blue", "K"),
        ("white", "black", "7"),
        ("blue", "red", "Q"),
        ("black", "white", "S"),
    )
)
QUICK = {
    "PPCL_RecordCalibration": {"samples": 16, "each_picture": 4, "batch": 4},
    "PPCL_CalibrateFromPrompts": {"samples": 8, "batch": 2, "steps": 2, "prompts": CAPTIONS},
    "PPCL_DemoCaption": {"captions": CAPTIONS},
    "KSampler": {"steps": 4},
    "PPCL_Detect": {"remove": 2, "longest": 2, "bootstrap": 4, "samples": 8},
    "PPCL_DistillDepth": {"rounds": 2, "updates": 4, "preview_seconds": 1},
    "PPCL_Sparsify": {
        "score": "wanda",
        "granularity": "row",
        "exchange": False,
        "compensate": False,
        "skip": "img_ txt_ add_",
        "preview_seconds": 1,
    },
    "PPCL_DistillWidth": {
        "choose": "by name",
        "sites": "ffn_text:22",
        "rounds": 1,
        "updates": 2,
        "polish_steps": 2,
        "preview_seconds": 0,
    },
}
"""What is changed of a shipped workflow so that a test can wait for it. No node and no link."""

Link = list


def shipped(name: str) -> dict:
    return json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))


def quickly(prompt: dict) -> dict:
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        node["inputs"] |= QUICK.get(node["class_type"], {})
    return prompt


@dataclass
class Graph:
    """A graph in the making."""

    known: dict
    """the server's /object_info"""
    first: int = 1
    """number of the first node; with another number the server uses no cached result"""
    nodes: dict[str, dict] = field(default_factory=dict)

    def add(self, kind: str, **inputs) -> str:
        """Adds a node, whose widgets keep their defaults unless given; returns its number."""
        number = str(self.first + len(self.nodes))
        self.nodes[number] = {"class_type": kind, "inputs": {**self.defaults(kind), **inputs}}
        return number

    def defaults(self, kind: str) -> dict:
        rows = self.known[kind]["input"]
        defaults = {}
        for name, (of, *more) in {**rows.get("required", {}), **rows.get("optional", {})}.items():
            options = more[0] if more else {}
            choices = of if isinstance(of, list) else options.get("options")
            if "default" in options:
                defaults[name] = options["default"]
            elif choices:
                defaults[name] = choices[0]
        return defaults

    def text(self, link: Link) -> str:
        """The number of a node that shows a text, so that the history has it."""
        return self.add("PreviewAny", source=link)
