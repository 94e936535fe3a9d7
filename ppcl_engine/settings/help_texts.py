"""A setting's help text, from the docstring under its field, so that the nodes' tooltips say the same
as the command line."""

from __future__ import annotations

import ast
import importlib
import inspect
from functools import lru_cache


def setting_help(kind: type, name: str) -> str:
    """The docstring under a field of a settings class, in one line. Raises ValueError for a field
    without one."""
    texts = _docstrings(kind.__module__).get(kind.__name__, {})
    if name not in texts:
        raise ValueError(
            f"{kind.__name__} has no help text for {name!r}; it documents: {', '.join(texts)}"
        )
    return texts[name]


@lru_cache(maxsize=8)
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    """class -> field -> docstring, from the module's source."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    return {c.name: _of_class(c) for c in tree.body if isinstance(c, ast.ClassDef)}


def _of_class(node: ast.ClassDef) -> dict[str, str]:
    pairs = zip(node.body, node.body[1:], strict=False)
    return {
        ast.unparse(field.target): " ".join(str(ast.literal_eval(text.value)).split())
        for field, text in pairs
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
