"""The public operations: their arguments are checked here, and the work is handed to the implementation.

Shapes: B batch, K shards (the last is the retain gradient), N elements of a shard.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from unlearn_kernels import reference

Shard: TypeAlias = Tensor | Sequence[Tensor]
"""One gradient: a tensor of any shape, or a list of them. Need not be contiguous, may be empty."""
Shards: TypeAlias = Tensor | Sequence[Shard]
"""K gradients with the same shapes entry by entry, or one [K, N] matrix whose rows are the gradients."""


def noise_and_target(
    x_f: Tensor, x_s: Tensor, eps: Tensor, path: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """The model input `x_t = a x_f + b eps` and the target `c_eps eps + c_f x_f + c_s x_s`.

    x_f, x_s, eps: floating [B, ...], the same shape. path: [B, 2], columns (a, b). coefficients: [B, 3], columns
    (c_eps, c_f, c_s). Computed in float32 (float64 if a tensor is), both results in the dtype of `x_f`.
    Raises ValueError when the shapes do not agree.
    """
    _check_samples(x_f=x_f, x_s=x_s, eps=eps)
    _check_rows(len(x_f), 2, path=path)
    _check_rows(len(x_f), 3, coefficients=coefficients)
    return reference.noise_and_target(x_f, x_s, eps, path, coefficients)


def weighted_loss(
    pred: Tensor,
    eps: Tensor,
    x_f: Tensor,
    x_s: Tensor,
    coefficients: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Scalar `mean_i weight_i mean_j (pred_ij - target_ij)^2`, target as in `noise_and_target`, never rounded.

    pred, eps, x_f, x_s: floating [B, ...], the same shape. coefficients: [B, 3]. weight: [B]. mask: bool or floating,
    [B, ...] broadcastable to pred; the inner mean is then over the masked elements, and a sample whose mask is empty
    adds 0. Computed and returned in float32 (float64 if a tensor is). Differentiable in `pred` only.
    Raises ValueError when the shapes do not agree or nothing is there to average over.
    """
    _check_samples(pred=pred, eps=eps, x_f=x_f, x_s=x_s)
    _check_rows(len(pred), 3, coefficients=coefficients)
    if weight.shape != (len(pred),):
        raise ValueError(f"weight: shape {tuple(weight.shape)}, expected ({len(pred)},)")
    if pred.numel() == 0:
        raise ValueError(f"pred: shape {tuple(pred.shape)} has no element to average over")
    if mask is not None and not _broadcasts(mask, pred):
        raise ValueError(f"mask: shape {tuple(mask.shape)} does not broadcast to {tuple(pred.shape)}")
    return reference.weighted_loss(pred, eps, x_f, x_s, coefficients, weight, mask)


def gram(shards: Shards) -> Tensor:
    """Inner products of K gradients: float64 [K, K] on their device, symmetric, accumulated in float64.

    The sum has one fixed order, whatever the number of threads and however the elements are spread over entries: equal
    gradients give equal bits. NaN and infinity propagate. Extra memory: O(K) chunks.
    Raises ValueError when there is no shard, or when shards differ in the shape of an entry.
    """
    return reference.gram(_check_shards(shards))


def combine_(out: Shard, shards: Shards, coefficients: Tensor) -> None:
    """`out = sum_k coefficients_k shard_k`, in place.

    out: the shape of a shard, entry by entry; it may BE one of the shards, but must not overlap one in any other way.
    coefficients: [K], float64 on the host. Accumulates in float32 (float64 if a tensor is) and rounds once, to the
    dtype of `out`. A coefficient of 0 does not hide a NaN. Extra memory: O(1) chunks.
    Raises ValueError when shapes or the number of coefficients do not agree.
    """
    entries = _check_shards(shards)
    outs = _entries(out)
    _check_same_shapes(outs, entries[0], "out")
    if coefficients.shape != (len(entries),):
        raise ValueError(f"coefficients: shape {tuple(coefficients.shape)}, expected ({len(entries)},)")
    reference.combine_(outs, entries, coefficients.tolist())


def _entries(shard: Shard) -> list[Tensor]:
    return [shard] if isinstance(shard, Tensor) else list(shard)


def _check_shards(shards: Shards) -> list[list[Tensor]]:
    if isinstance(shards, Tensor):
        if shards.ndim != 2:
            raise ValueError(f"shards: a matrix [K, N] or a sequence of gradients, not shape {tuple(shards.shape)}")
        shards = shards.unbind(0)
    entries = [_entries(shard) for shard in shards]
    if not entries:
        raise ValueError("shards: at least one gradient is needed")
    for k, shard in enumerate(entries):
        _check_same_shapes(shard, entries[0], f"shards[{k}]")
    return entries


def _check_same_shapes(shard: list[Tensor], first: list[Tensor], name: str) -> None:
    if len(shard) != len(first):
        raise ValueError(f"{name}: {len(shard)} entries, shards[0] has {len(first)}")
    for i, (a, b) in enumerate(zip(shard, first, strict=True)):
        if a.shape != b.shape:
            raise ValueError(f"{name}[{i}]: shape {tuple(a.shape)}, in shards[0] it is {tuple(b.shape)}")


def _check_samples(**tensors: Tensor) -> None:
    first, shape = next((name, tensor.shape) for name, tensor in tensors.items())
    for name, tensor in tensors.items():
        if tensor.ndim == 0 or tensor.shape != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected [B, ...] as {first} {tuple(shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: dtype {tensor.dtype}, expected a floating one")


def _check_rows(batch: int, columns: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != (batch, columns):
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected ({batch}, {columns})")


def _broadcasts(mask: Tensor, pred: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(mask.shape, pred.shape) == pred.shape
    except RuntimeError:
        return False
