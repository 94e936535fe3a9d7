"""A docstring is a sentence that can be read without the name of what it describes."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[1]
FRAGMENT = re.compile(r"(Of|Those) ")
NOT_YET = (PACK / "ppcl_engine" / "estimate",)  # four of its docstrings still begin this way


def described(text: str) -> Iterator[tuple[str, str]]:
    """(name, docstring) of a module and of every class and function in it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and (docstring := ast.get_docstring(node)):
            yield getattr(node, "name", "the module"), docstring


@pytest.mark.parametrize("folder", ["ppcl_engine", "nodes", "benchmarks"])
def test_docstrings_begin_as_a_sentence_does(folder):
    fragments = [
        f"{path.relative_to(PACK)}, {name}: {docstring.splitlines()[0]}"
        for path in sorted((PACK / folder).rglob("*.py"))
        if path.parent not in NOT_YET
        for name, docstring in described(path.read_text(encoding="utf-8"))
        if FRAGMENT.match(docstring)
    ]
    assert fragments == []


def test_a_fragment_is_found():
    code = 'def size(file):\n    """Of the file, in bytes."""\n'
    assert [name for name, text in described(code) if FRAGMENT.match(text)] == ["size"]
