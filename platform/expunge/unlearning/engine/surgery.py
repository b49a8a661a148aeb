"""From local shards to one clipped gradient in place: Gram matrices, one all-reduce, coefficients, one combination."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from expunge.errors import InputError
from expunge.settings import MethodSettings
from expunge.unlearning.engine.geometry import SecondMoment, local_grams
from expunge.unlearning.engine.shards import Shard
from unlearn_kernels import clip_coefficient, combine_, conflicts, cosines, surgery


@dataclass(frozen=True)
class StepStatistics:
    """What one step did; equal on every rank. There are K forget objectives, and the retain objective comes last."""

    losses: list[float]
    """[K + 1]: mean over micro-batches and ranks."""
    cosine: float
    """Cosine of a forget gradient and the retain gradient, mean over the K, in the geometry of the surgery."""
    conflict: float
    """Share of the K that point against the retain gradient, in the same geometry."""
    norm: float
    """Euclidean norm of the combined gradient, before the clip."""
    stashed: int
    """Bytes that this rank kept beside the gradient that the optimizer needs anyway."""
    bad: tuple[int, ...] = ()
    """Objectives whose loss or gradient is not finite. If there are any, the step was skipped."""


def reduce_grams(
    shards: Sequence[Shard],
    groups: Sequence[Sequence[int]],
    moment: SecondMoment | None,
    losses: Tensor,
    sum_over_ranks: Callable[[Tensor], Tensor],
    *,
    disjoint: bool,
) -> Tensor:
    """Return Gram matrices over all ranks, float64 [M, G, K + 1, K + 1], and average the losses in place.

    shards: this rank's K + 1. groups: G lists of indices into a shard, empty if this rank holds nothing of a group.
    moment: AdamW's, to project in its geometry; M is then 2, else 1: the plain matrices first, and last those by which
    to project. losses: float64 [K + 1]. It takes one all-reduce of M G (K + 1)^2 + K + 1 numbers.
    """
    local = torch.stack([local_grams(shards, group, moment) for group in groups], 1)
    world = dist.get_world_size()
    if world > 1:
        packed = sum_over_ranks(torch.cat([local.flatten() if disjoint else local.flatten() / world, losses / world]))
        local = packed[: local.numel()].view_as(local)
        losses.copy_(packed[local.numel() :])
    return local


def operate(
    shards: Sequence[Shard], groups: Sequence[Sequence[int]], grams: Tensor, method: MethodSettings, step: int
) -> tuple[float, float, float]:
    """Write the clipped combination over the last shard; return mean cosine, share of conflicts, and norm.

    grams: [M, G, K + 1, K + 1], from `reduce_grams`. The clip is by the plain norm in either geometry.
    """
    plain, inner = grams[0], grams[-1]
    coefficients = [choose(matrix, method, step) for matrix in inner]
    square = sum((c @ matrix @ c for c, matrix in zip(coefficients, plain, strict=True)), torch.zeros(()))
    # The Gram matrix [1, 1] of the combination itself: the norm is over all groups, whatever the granularity.
    clip = clip_coefficient(square.clamp_min(0).view(1, 1), torch.ones(1), method.clip)
    for group, c in zip(groups, coefficients, strict=True):
        if group:
            pieces = [[shard[i] for i in group] for shard in shards]
            combine_(pieces[-1], pieces, c * clip)
    whole = inner.sum(0)
    conflict = conflicts(whole).double().mean().item()
    return cosines(whole).mean().item(), conflict, square.clamp_min(0).sqrt().item()


def choose(matrix: Tensor, method: MethodSettings, step: int) -> Tensor:
    """Choose the coefficients, float64 [K + 1], of the gradients with this Gram matrix: here a surgery happens."""
    return surgery(method.surgery, matrix, method.forget_weight, seed=method.seed + step)


def check_surgery(method: MethodSettings) -> None:
    """Raise InputError before the training starts if a package that the surgery needs is not installed."""
    try:
        choose(torch.eye(2, dtype=torch.float64), method, 0)
    except ImportError as error:
        raise InputError(
            f"training.surgery: {method.surgery} cannot run here ({error})",
            hint="install the extra, or set it to retain_normal",
        ) from None


def bad_objectives(grams: Tensor, losses: Tensor) -> tuple[int, ...]:
    """Return the indices of the objectives whose loss or gradient holds a NaN or an infinity."""
    fine = grams.sum((0, 1)).diagonal().isfinite() & losses.isfinite()
    return tuple(torch.nonzero(~fine).flatten().tolist())


def groups_of(names: Sequence[str], local: Sequence[str], granularity: str) -> list[list[int]]:
    """Sort the indices of `local` pieces into groups. These come from all `names`, so every rank has the same ones."""
    keys = dict.fromkeys(_key(name, granularity) for name in names)
    members: dict[str, list[int]] = {key: [] for key in keys}
    for index, name in enumerate(local):
        members[_key(name, granularity)].append(index)
    return list(members.values())


def _key(name: str, granularity: str) -> str:
    """Name the group: `blocks.3.attn.to_q.weight` is in the layer `blocks.3`, and `norm.weight` in `norm`."""
    if granularity == "global":
        return ""
    if granularity == "tensor":
        return name
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])
