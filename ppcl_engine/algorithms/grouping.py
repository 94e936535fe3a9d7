"""Work is done in groups of neighbours that fit into memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def groups_within(
    limit: float, items: Iterable[Item], size: Callable[[list[Item]], float]
) -> Iterator[list[Item]]:
    """Groups of consecutive items, each as long as its size is within `limit`, and of one item at
    least."""
    group: list[Item] = []
    for item in items:
        if group and size([*group, item]) > limit:
            yield group
            group = []
        group.append(item)
    if group:
        yield group
