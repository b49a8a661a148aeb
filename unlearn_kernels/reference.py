"""Every operation in plain torch: exact, bounded in memory, and the oracle for anything faster.

Arguments arrive checked, see `ops`.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

CHUNK = 1 << 16
"""Elements that are worked on at a time; a power of two, see `_sum_in_fixed_order_`."""


def noise_and_target(
    x_f: Tensor, x_s: Tensor, eps: Tensor, path: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = _compute_dtype(x_f, x_s, eps)
    a, b = _columns(path, x_f, dtype)
    x_t = a * x_f.to(dtype) + b * eps.to(dtype)
    return x_t.to(x_f.dtype), _target(eps, x_f, x_s, coefficients, dtype).to(x_f.dtype)


def weighted_loss(
    pred: Tensor, eps: Tensor, x_f: Tensor, x_s: Tensor, coefficients: Tensor, weight: Tensor, mask: Tensor | None
) -> Tensor:
    dtype = _compute_dtype(pred, eps, x_f, x_s)
    with torch.no_grad():
        target = _target(eps, x_f, x_s, coefficients, dtype)
    weight = weight.detach().to(pred.device, dtype)
    difference = pred.to(dtype) - target
    if mask is None:
        return (weight * difference.square().reshape(len(pred), -1).mean(1)).mean()
    keep = mask.detach().to(pred.device, dtype).expand_as(pred)
    # Zeroed before it is squared: what is masked out may be NaN, in the gradient too.
    squares = difference.where(keep != 0, 0).square()
    sums, sizes = ((keep * x).reshape(len(pred), -1).sum(1) for x in (squares, torch.ones_like(squares)))
    return (weight * sums / sizes.where(sizes > 0, 1)).mean()


@torch.no_grad()
def gram(shards: list[list[Tensor]]) -> Tensor:
    count = len(shards)
    device = shards[0][0].device if shards[0] else torch.device("cpu")
    total = torch.zeros(count, count, dtype=torch.float64, device=device)
    for chunk in _stream(shards, device):
        for i in range(count):
            total[i, i:] += _sum_in_fixed_order_(chunk[i] * chunk[i:])
    return total.triu() + total.triu(1).T


@torch.no_grad()
def combine_(out: list[Tensor], shards: list[list[Tensor]], coefficients: Sequence[float]) -> None:
    for out_entry, *entries in zip(out, *shards, strict=True):
        dtype = _compute_dtype(out_entry, *entries)
        for out_piece, *pieces in _pieces([out_entry, *entries]):
            # Every piece is read before the output is written, so the output may be one of them.
            total = pieces[0].to(dtype) * coefficients[0]
            for piece, coefficient in zip(pieces[1:], coefficients[1:], strict=True):
                total.add_(piece.to(dtype), alpha=coefficient)
            out_piece.copy_(total)


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _columns(table: Tensor, like: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The columns of [B, C], each shaped to broadcast over the trailing dimensions of `like` [B, ...]."""
    shape = (len(like), *[1] * (like.ndim - 1))
    return [column.reshape(shape) for column in table.to(like.device, dtype).unbind(1)]


def _target(eps: Tensor, x_f: Tensor, x_s: Tensor, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
    c_eps, c_f, c_s = _columns(coefficients, eps, dtype)
    return c_eps * eps.to(dtype) + c_f * x_f.to(dtype) + c_s * x_s.to(dtype)


def _stream(shards: list[list[Tensor]], device: torch.device) -> Iterator[Tensor]:
    """The K gradients side by side, as float64 [K, CHUNK] of one buffer that is used again; the last is zero-padded.

    Chunks run across the entries: many small tensors cost no more passes than one large one.
    """
    buffer = torch.zeros(len(shards), CHUNK, dtype=torch.float64, device=device)
    filled = 0
    for entries in zip(*shards, strict=True):
        for pieces in _pieces(entries):
            rest = [piece.reshape(-1) for piece in pieces]
            while rest[0].numel():
                size = min(CHUNK - filled, rest[0].numel())
                for row, piece in zip(buffer, rest, strict=True):
                    row[filled : filled + size].copy_(piece[:size])
                rest = [piece[size:] for piece in rest]
                filled += size
                if filled == CHUNK:
                    yield buffer
                    filled = 0
    if filled:
        buffer[:, filled:] = 0
        yield buffer


def _sum_in_fixed_order_(values: Tensor) -> Tensor:
    """Sum [R, CHUNK] over its last dimension, destroying it.

    torch.sum, torch.dot and matrix products split one sum over threads, so their last bits change with the number of
    threads. Adding the upper half to the lower half is elementwise: the same additions in the same tree, always.
    """
    half = values.shape[-1] // 2
    while half:
        values[:, :half] += values[:, half : 2 * half]
        half //= 2
    return values[:, 0]


def _pieces(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cut tensors of one shape alike, into views of at most CHUNK elements, in logical order."""
    first = tensors[0]
    if first.numel() <= CHUNK:
        yield list(tensors)
    elif all(tensor.is_contiguous() for tensor in tensors):
        yield from map(list, zip(*[tensor.view(-1).split(CHUNK) for tensor in tensors], strict=True))
    elif len(first) == 1:
        yield from _pieces([tensor[0] for tensor in tensors])
    else:
        rows = max(1, CHUNK * len(first) // first.numel())
        for parts in zip(*[tensor.split(rows) for tensor in tensors], strict=True):
            yield from _pieces(parts)
