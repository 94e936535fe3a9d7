"""Graders: what judges the pictures of a benchmark, chosen by what it has to do and what is there."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

from .base import READ, Grader
from .rendered_world import RenderedWorldReader
from .text_reader import TextReader
from .vision_language import VisionLanguageModel


def open_grader(
    needs: Set[str], judge: Path | None, rendered: bool, benchmark: str, device: str
) -> Grader:
    """The judge that is named; else the reader of the rendered world for a model that draws it
    (`rendered`); else rapidocr, where text is all that must be read. Raises ValueError in one line
    where none is there."""
    if judge is not None:
        return VisionLanguageModel(judge, device)
    if rendered:
        return RenderedWorldReader()
    if needs <= {READ}:
        return TextReader(f"--benchmark {benchmark} without --judge")
    raise ValueError(
        f"--benchmark {benchmark} needs a judge: put a vision-language model that transformers reads, "
        "such as Qwen2.5-VL-7B-Instruct, into a folder and name it with --judge"
    )
