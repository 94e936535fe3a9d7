"""Which weights may be zero: any (unstructured), or M - N of every M neighbours of a row (N:M)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

UNSTRUCTURED = "unstructured"
PATTERNS = (UNSTRUCTURED, "2:4", "4:8")


@dataclass(frozen=True)
class Pattern:
    """Which weights of a row may be zero."""

    name: str
    """as in the settings"""
    keep: int = 0
    """how many of every `of` neighbours stay; 0: unstructured"""
    of: int = 0
    """size of a group; 0: unstructured"""

    @property
    def is_structured(self) -> bool:
        return self.of > 0

    def check_columns(self, columns: int, where: str) -> None:
        """Raises ValueError for a layer whose number of inputs does not divide into groups."""
        if self.is_structured and columns % self.of:
            raise ValueError(
                f"{where} has {columns} inputs, which is not a multiple of {self.of}; leave it dense with --skip, or "
                "choose --pattern unstructured"
            )


def pattern_named(name: str) -> Pattern:
    if name not in PATTERNS:
        raise ValueError(f"pattern {name!r} is unknown; known: {', '.join(PATTERNS)}")
    if name == UNSTRUCTURED:
        return Pattern(name)
    keep, of = map(int, name.split(":"))
    return Pattern(name, keep, of)


def checked_sparsity(sparsity: float | None, pattern: Pattern) -> float:
    """The share of weights to drop; None: the pattern's own, or a half. Raises ValueError for an
    impossible share."""
    own = 1 - pattern.keep / pattern.of if pattern.is_structured else 0.5
    if sparsity is None:
        return own
    if not 0 < sparsity < 1:
        raise ValueError(
            f"sparsity {sparsity:g} is not a share of weights to drop; choose a number between 0 and 1, such as 0.5"
        )
    if pattern.is_structured and sparsity != own:
        raise ValueError(
            f"sparsity {sparsity:g}: {pattern.name} drops {own:g} of the weights; give that, or leave it out"
        )
    return sparsity


def kept_of_groups(score: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The `keep` highest of every `of` neighbours [rows, columns], bool; among equal ones the
    last."""
    groups = score.reshape(len(score), -1, pattern.of)
    order = groups.argsort(dim=-1, stable=True)
    kept = torch.zeros_like(groups, dtype=torch.bool)
    return kept.scatter_(-1, order[..., pattern.of - pattern.keep :], True).reshape(score.shape)
