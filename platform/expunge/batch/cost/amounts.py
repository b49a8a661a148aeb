"""Amounts of several kinds that add up, each with its own."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self


@dataclass(frozen=True)
class Amounts:
    """The base of dataclasses of which every field is an amount."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    def _each(self, change: Callable[[int], int] | Callable[[float], float]) -> Self:
        """Return these amounts, each of them changed."""
        return type(self)(*(change(getattr(self, part.name)) for part in fields(self)))
