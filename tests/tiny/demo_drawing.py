"""A caption that the bundled teacher draws, and the command that draws it in one step."""

from __future__ import annotations

from ppcl_engine.demo.bundled import TEACHER

CAPTION = "a red K on a blue circle, yellow background"


def drawing(output, prompt: str = CAPTION) -> list:
    options = ["--steps", 1, "--device", "cpu", "--output", output]
    return ["generate", "--path", TEACHER, "--prompt", prompt, *options]
