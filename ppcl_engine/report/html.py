"""The elements of a report's page. Text from a user goes through `tag`, which escapes it."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from .texts import STYLE

NONE = "–"  # a figure that was not measured


class Html(str):
    """Text that is HTML already and needs no escaping."""


def tag(name: str, *content: object, **attributes: object) -> Html:
    """An element; everything in it that is not Html is escaped."""
    text = "".join(
        f' {key.rstrip("_")}="{html.escape(str(value))}"' for key, value in attributes.items()
    )
    return Html(f"<{name}{text}>{joined(content)}</{name}>")


def joined(content: tuple | list) -> Html:
    """The parts one after the other; those that are not Html are escaped."""
    return Html(
        "".join(part if isinstance(part, Html) else html.escape(str(part)) for part in content)
    )


def document(title: str, *content: Html) -> str:
    """A whole page, with everything in it."""
    head = [
        Html(
            '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        ),
        tag("title", title),
        tag("style", Html(STYLE)),
    ]
    body = tag("body", tag("main", *content))
    return f"<!doctype html>\n{tag('html', tag('head', *head), body, lang='en')}\n"


def image(png: bytes, alt: str, **attributes: object) -> Html:
    data = base64.b64encode(png).decode()
    text = "".join(
        f' {key.rstrip("_")}="{html.escape(str(value))}"' for key, value in attributes.items()
    )
    return Html(f'<img alt="{html.escape(alt)}"{text} src="data:image/png;base64,{data}">')


def table(heads: list[str], rows: Sequence[Sequence[object]], classes: str = "") -> Html:
    """The first cell of a row is its name; the others are numbers."""
    head = tag("tr", *(tag("th", h, scope="col") for h in heads))
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    ]
    return tag(
        "div",
        tag("table", tag("thead", head), tag("tbody", *body), class_=f"numbers {classes}"),
        class_="scroll",
    )
