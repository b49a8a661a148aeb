"""Buckets: the numbers that ranks exchange at once, the same stretch of every rank's partition of a flat gradient."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A range of a parameter's numbers; without a parameter, padding."""

    parameter: int | None
    start: int
    stop: int


@dataclass(frozen=True)
class Bucket:
    """The numbers from `begin` to `end` of every rank's partition."""

    begin: int
    end: int
    pieces: tuple[Piece, ...]
    """The contents, rank after rank."""

    def fill(self, out: Tensor, gradients: Sequence[Tensor]) -> None:
        """Copy the numbers into `out` [ranks * (end - begin)]. gradients: one flat tensor for each parameter."""
        parts = [
            out.new_zeros(piece.stop)
            if piece.parameter is None
            else gradients[piece.parameter][piece.start : piece.stop]
            for piece in self.pieces
        ]
        torch.cat(parts, out=out)


def buckets_of(sizes: Sequence[int], offsets: Sequence[int], length: int, ranks: int, most: int) -> list[Bucket]:
    """Cut `ranks` consecutive partitions of `length` numbers into buckets of at most `most` numbers.

    Parameters of these sizes lie at these ascending offsets; there may be padding between and behind them.
    """
    width = max(1, most // ranks)
    found = []
    for begin in range(0, length, width):
        end = min(begin + width, length)
        stretches = [(rank * length + begin, rank * length + end) for rank in range(ranks)]
        pieces = tuple(piece for stretch in stretches for piece in _pieces(sizes, offsets, *stretch))
        found.append(Bucket(begin, end, pieces))
    return found


def _pieces(sizes: Sequence[int], offsets: Sequence[int], begin: int, end: int) -> Iterator[Piece]:
    """Yield the pieces that lie between two offsets."""
    at = begin
    for index in range(max(0, bisect_right(offsets, begin) - 1), bisect_right(offsets, end - 1)):
        start, stop = max(offsets[index], begin), min(offsets[index] + sizes[index], end)
        if start >= stop:
            continue
        if start > at:
            yield Piece(None, 0, start - at)
        yield Piece(index, start - offsets[index], stop - offsets[index])
        at = stop
    if at < end:
        yield Piece(None, 0, end - at)
