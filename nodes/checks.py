"""Checks what comes into a node against the node's own schema.

The web page sends what its widgets allow, but a program may send anything, and so may a link from a
node of any type. The host checks some of it itself, newer versions more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from numbers import Integral, Real

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.v0_0_2 import io

MOST_CHARACTERS = 100_000  # in a text: thousands of prompts
MOST_LISTED = 160  # characters of the choices that a message lists
MOST_CHOICES = 12  # that a message lists
LONGEST_NAME = 1_000  # characters of a choice
LONGEST = 60  # characters of a wrong value in a message

LINKS: dict[str, Callable[[object], bool]] = {
    "MODEL": lambda value: isinstance(value, ModelPatcher),
    "CLIP": lambda value: (
        hasattr(value, "tokenize") and hasattr(value, "encode_from_tokens_scheduled")
    ),
    "LATENT": lambda value: isinstance(value, Mapping) and "samples" in value,
    "IMAGE": lambda value: isinstance(value, torch.Tensor) and value.ndim == 4,
    "SIGMAS": lambda value: isinstance(value, torch.Tensor) and value.ndim == 1,
    "PPCL_RUN": lambda value: isinstance(value, str),
}
"""type of a link -> whether a value is of that type"""


def check_inputs(
    schema: io.Schema, given: Mapping[str, object], looked_up: Collection[str] = ()
) -> None:
    """Raises ValueError, in one line, for a value that its input does not take. looked_up: inputs
    whose choice is not compared with the list: the node looks it up itself, and explains more."""
    for row in schema.inputs:
        value = given.get(row.id)
        left_out = row.id not in given or (value is None and row.optional)
        if not left_out and (problem := problem_of(row, value, row.id in looked_up)):
            raise ValueError(f"{schema.display_name}: {row.id} {problem}")


def problem_of(row: io.Input, value: object, looked_up: bool = False) -> str:
    """What is wrong with a value, in words that follow the input's name; "" if nothing is."""
    match row.io_type:
        case "INT":
            return _number(row, value, Integral, "whole number")
        case "FLOAT":
            return _number(row, value, Real, "number")
        case "BOOLEAN":
            return "" if isinstance(value, bool) else f"is {shown(value)}; give true or false"
        case "STRING":
            return _text(value)
        case "COMBO":
            return _choice(row.options, value, looked_up)
    fits = LINKS[row.io_type](value)
    return "" if fits else f"is {shown(value)}; connect it to an output of the type {row.io_type}"


def _number(row: io.Input, value: object, kind: type, name: str) -> str:
    fits = isinstance(value, kind) and not isinstance(value, bool) and row.min <= value <= row.max
    return (
        "" if fits else f"is {shown(value)}; give a {name} from {row.min:,.10g} to {row.max:,.10g}"
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        return f"is {shown(value)}; give a text"
    if len(value) > MOST_CHARACTERS:
        return f"has {len(value):,} characters; give at most {MOST_CHARACTERS:,}"
    return (
        ""
        if is_unicode(value)
        else f"is {shown(value)}, which cannot be written to a file; type it again"
    )


def is_unicode(text: str) -> bool:
    """Whether a text can be written to a file: JSON can hold halves of a character."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _choice(options: Collection[str], value: object, looked_up: bool) -> str:
    if isinstance(value, str) and (value in options or (looked_up and len(value) <= LONGEST_NAME)):
        return ""
    names = list(options)[:MOST_CHOICES]
    more = f", ... ({len(options):,} in all)" if len(options) > MOST_CHOICES else ""
    known = ", ".join(names)
    known = known if len(known) <= MOST_LISTED else f"{known[:MOST_LISTED]} ..."
    return f"{shown(value)} is not a choice; choose from {known}{more}"


def shown(value: object) -> str:
    """A value for a message, in one short line; of an object, its type."""
    if not isinstance(value, str | int | float | list | dict | None):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
