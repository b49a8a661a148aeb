"""Every operation in plain torch and float64: the oracle of tests and benchmarks, and the fallback on every device.

Arguments arrive checked and contiguous, see `ops`. Results are rounded once, to the dtype of the data.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from unlearn_kernels.backends import gradient_dtype

CHUNK = 1 << 16
"""The number of elements that are processed at a time; a power of two, see `_sum_in_fixed_order_`."""


def noise_and_target(
    x_f: Tensor, x_s: Tensor, eps: Tensor, path: Tensor, coefficients: Tensor, *, with_target: bool
) -> tuple[Tensor, Tensor | None]:
    x_t = _mix([x_f, eps], path).to(x_f.dtype)
    return x_t, _mix([eps, x_f, x_s], coefficients).to(x_f.dtype) if with_target else None


def weighted_loss(
    pred: Tensor,
    terms: Sequence[Tensor],
    coefficients: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    batch, size = len(pred), pred.numel() // len(pred)
    difference = pred.double() - _mix(terms, coefficients)
    if mask is None:
        keep, elements = torch.ones(1, dtype=torch.float64, device=pred.device), torch.full_like(weight, size).double()
    else:
        repeats = size // mask.shape[1]
        keep = mask.double().unsqueeze(1).expand(-1, repeats, -1).reshape(pred.shape)
        # Zeroed before it is squared: masked elements may be NaN, which would reach the gradient.
        difference = difference.where(keep != 0, 0)
        elements = mask.double().sum(1) * repeats
    # The factor of a sample's squares in the loss; a sample whose mask is empty does not count.
    factor = torch.where(elements > 0, weight.double() / (elements * batch), 0)
    loss = (factor * (keep * difference.square()).reshape(batch, -1).sum(1)).sum()
    if not any(tensor.dtype == torch.float64 for tensor in (pred, *terms)):
        loss = loss.float()
    if not with_gradient:
        return loss, None
    return loss, (2 * _over(factor, pred) * keep * difference).to(gradient_dtype(pred))


def gram(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    count, device = len(gradients), gradients[0][0].device
    total = torch.zeros(count, count, dtype=torch.float64, device=device)
    for chunk in _stream(gradients, device):
        _add_products_(total, chunk, chunk)
    return _mirrored(total)


def preconditioned_gram(
    gradients: Sequence[Sequence[Tensor]], second_moment: Sequence[Tensor], correction: float, eps: float
) -> Tensor:
    count, device = len(gradients), second_moment[0].device
    total = torch.zeros(2, count, count, dtype=torch.float64, device=device)
    for chunk in _stream([*gradients, second_moment], device):
        rows, moment = chunk[:-1], chunk[-1]
        _add_products_(total[0], rows, rows)
        _add_products_(total[1], rows / ((moment / correction).sqrt() + eps), rows)
    return _mirrored(total)


def combine_(out: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]], coefficients: Sequence[float]) -> None:
    for entries in zip(out, *gradients, strict=True):
        for out_piece, *pieces in _pieces(entries):
            # Every piece is read before the output is written, so the output may be one of them.
            total = pieces[0].double() * coefficients[0]
            for piece, coefficient in zip(pieces[1:], coefficients[1:], strict=True):
                total.add_(piece.double(), alpha=coefficient)
            out_piece.copy_(total)


def _over(column: Tensor, like: Tensor) -> Tensor:
    """Reshape [B] so that it broadcasts over the trailing dimensions of `like` [B, ...]."""
    return column.reshape(len(like), *[1] * (like.ndim - 1))


def _mix(tensors: Sequence[Tensor], table: Tensor) -> Tensor:
    """Compute `sum_n table[:, n] tensors[n]` in float64, for tensors [B, ...] and table [B, len(tensors)]."""
    columns = table.double().unbind(1)
    first, *others = (_over(c, tensor) * tensor.double() for c, tensor in zip(columns, tensors, strict=True))
    return sum(others, first)


def _stream(gradients: Sequence[Sequence[Tensor]], device: torch.device) -> Iterator[Tensor]:
    """Yield the K gradients side by side, as float64 [K, CHUNK], in one buffer that is reused; the last is zero-padded.

    Chunks run across the entries: many small tensors cost no more passes than one large one.
    """
    buffer = torch.zeros(len(gradients), CHUNK, dtype=torch.float64, device=device)
    filled = 0
    for entries in zip(*gradients, strict=True):
        for pieces in _pieces(entries):
            rest = list(pieces)
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


def _add_products_(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add to total [K, K], on and above its diagonal, the inner products of rows x [K, CHUNK] and y [K, CHUNK]."""
    for i in range(len(x)):
        total[i, i:] += _sum_in_fixed_order_(x[i] * y[i:])


def _mirrored(upper: Tensor) -> Tensor:
    """Fill [..., K, K] below its diagonal."""
    return upper.triu() + upper.triu(1).mT


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


def _pieces(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Cut contiguous tensors of one shape alike, into flat views of at most CHUNK elements."""
    return zip(*[tensor.view(-1).split(CHUNK) for tensor in tensors], strict=True)
