"""Forget objectives: which samples share a gradient. There is one objective per request, or one for all of them."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from expunge.settings import ShardingSettings, TrainingSettings
from expunge.unlearning.sampling import deal, numbers, pick, pick_by_weight, shuffled

Mode = Literal["request", "batch"]


@dataclass(frozen=True)
class ForgetObjective:
    requests: tuple[int, ...]
    """The requests whose samples are in it, as indices into the job's requests."""
    samples: Tensor
    """int64 [m]: the indices of its samples among the step's."""


@dataclass(frozen=True)
class ForgetStep:
    """The forget objectives of a step; equal on every worker."""

    objectives: tuple[ForgetObjective, ...]
    rows: Tensor
    """int64 [n]: for each sample of the step, the row of the forget set that it is made from."""


def forget_step(
    training: TrainingSettings, mode: Mode, request: Tensor, step: int, missing: Tensor | None = None
) -> ForgetStep:
    """Choose the samples of `step` and divide them into objectives. request: int64 [N], the request of each row.

    In mode "request" each of K requests has `forget_batch // K` samples, but at least one per worker, because every
    worker takes part in every gradient. So a step has `forget_batch` samples, or `K * workers` if that is more.
    Requests come in shuffled rounds that are cut into equal parts of at most `objectives_per_step`; each round has
    every request once. The rows of a request come in shuffled rounds, too, so all come equally often.

    missing: float64 [R], how far each request has to go, from the adaptive budget. Requests at 0 are left out; at least
    one must be above 0. In mode "batch" the others share the batch in proportion to it. In mode "request" they first
    get one sample per worker each, and share the rest.
    """
    if mode == "batch":
        if missing is None:
            rows = pick(training.seed, "forget", step, len(request), training.forget_batch)
        else:
            rows = pick_by_weight(missing[request], numbers(step, training.forget_batch))
        present = tuple(sorted({int(r) for r in request[rows]}))
        return ForgetStep((ForgetObjective(present, torch.arange(training.forget_batch)),), rows)
    everyone = request.unique()
    if missing is not None:
        everyone = everyone[missing[everyone] > 0]
    parts = math.ceil(len(everyone) / training.objectives_per_step)
    round_, part = divmod(step, parts)
    order = shuffled(training.seed, "request", round_, len(everyone))
    chosen = everyone[order.tensor_split(parts)[part]]
    if missing is None:
        each = torch.full((len(chosen),), max(training.workers, training.forget_batch // len(chosen)))
    else:
        each = allot(training, missing[chosen], step)
    rows = [
        _rows_of(training.seed, int(r), torch.nonzero(request == r).flatten(), round_, int(n))
        for r, n in zip(chosen, each, strict=True)
    ]
    samples = torch.arange(int(each.sum())).split(each.tolist())
    objectives = [ForgetObjective((int(r),), mine) for r, mine in zip(chosen, samples, strict=True)]
    return ForgetStep(tuple(objectives), torch.cat(rows))


def allot(training: TrainingSettings, missing: Tensor, step: int) -> Tensor:
    """Return how many samples of a step each of K requests gets, int64 [K].

    Each gets one per worker; the rest of `forget_batch` is shared in proportion to `missing`.
    """
    rest = max(0, training.forget_batch - len(missing) * training.workers)
    more = pick_by_weight(missing, numbers(step, rest))
    return training.workers + torch.bincount(more, minlength=len(missing))


def micro_batches(sharding: ShardingSettings, samples: Tensor, rank: int, world: int) -> list[tuple[Tensor, float]]:
    """Cut a worker's part of an objective's samples into micro-batches, each with a factor for its mean loss.

    With these factors the mean over micro-batches and workers is the mean over all samples, whether or not they divide
    evenly. Every worker has the same number of micro-batches, because they all take part in each reduction.
    """
    shares = [samples[r::world] for r in range(world)]
    most, least = len(shares[0]), len(shares[-1])
    assert least > 0, f"{len(samples)} samples for {world} workers"
    count = min(least, math.ceil(most / sharding.micro_batch)) if sharding.micro_batch else 1
    return [(part, len(part) * count * world / len(samples)) for part in shares[rank].tensor_split(count)]


def _rows_of(seed: int, request: int, rows: Tensor, visit: int, count: int) -> Tensor:
    """Choose the rows of a request's `count` samples at its `visit`-th turn."""
    return rows[deal(seed, "row", len(rows), numbers(visit, count), request)]
