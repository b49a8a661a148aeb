"""What the ranks hand each other at once: for every rank the same stretch of its partition of a flat gradient."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A range of a parameter's numbers, or of nothing: padding."""

    parameter: int | None
    start: int
    stop: int


@dataclass(frozen=True)
class Bucket:
    """Numbers `begin` to `end` of every rank's partition."""

    begin: int
    end: int
    pieces: tuple[Piece, ...]
    """What lies there, rank after rank."""

    def fill(self, out: Tensor, gradients: Sequence[Tensor]) -> None:
        """out: [ranks * (end - begin)]. gradients: the flattened one of every parameter."""
        parts = [
            out.new_zeros(piece.stop)
            if piece.parameter is None
            else gradients[piece.parameter][piece.start : piece.stop]
            for piece in self.pieces
        ]
        torch.cat(parts, out=out)


def buckets_of(sizes: Sequence[int], offsets: Sequence[int], length: int, ranks: int, most: int) -> list[Bucket]:
    """Of at most `most` numbers each, for `ranks` partitions of `length`, one after the other.

    Parameters of these sizes lie at these offsets, ascending; between and behind them there may be padding.
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
    """What lies between two places."""
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
