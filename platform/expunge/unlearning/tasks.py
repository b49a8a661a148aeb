"""Which samples share a gradient: one objective a request, or one for all of them."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from expunge.settings import TrainingSettings
from expunge.unlearning.sampling import pick, pick_by_weight, shuffled

Mode = Literal["request", "batch"]


@dataclass(frozen=True)
class Task:
    """One forget objective of a step."""

    requests: tuple[int, ...]
    """Whose samples are in it: indices into the job's requests."""
    samples: Tensor
    """int64 [m]: which of the step's samples are its."""


@dataclass(frozen=True)
class ForgetStep:
    """The forget objectives of a step, equal on every worker."""

    tasks: tuple[Task, ...]
    rows: Tensor
    """int64 [n]: the row of the forget set that each sample of the step is made from."""


def forget_step(
    training: TrainingSettings, mode: Mode, request: Tensor, step: int, missing: Tensor | None = None
) -> ForgetStep:
    """Who is removed at `step`. request: int64 [N], the request of each row of the forget set.

    In mode "request" each of K requests has `forget_batch // K` samples, and at least one a worker, as every worker
    takes part in every gradient: so a step has `forget_batch` samples, or `K * workers` where that is more. Requests
    come in shuffled rounds of equal parts of at most `tasks_per_step`, and so do the rows of a request: each round has
    every request once, and all rows of a request come equally often.

    missing: float64 [R], of an adaptive budget: requests at 0 are left out, which must not be all of them. In mode
    "request" the others share what is left of the batch by it, when every worker has its one; in mode "batch", all.
    """
    if mode == "batch":
        if missing is None:
            rows = pick(training.seed, "forget", step, len(request), training.forget_batch)
        else:
            rows = pick_by_weight(missing[request], _positions(step, training.forget_batch))
        present = tuple(sorted({int(r) for r in request[rows]}))
        return ForgetStep((Task(present, torch.arange(training.forget_batch)),), rows)
    everyone = request.unique()
    if missing is not None:
        everyone = everyone[missing[everyone] > 0]
    parts = math.ceil(len(everyone) / training.tasks_per_step)
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
    tasks = [Task((int(r),), mine) for r, mine in zip(chosen, samples, strict=True)]
    return ForgetStep(tuple(tasks), torch.cat(rows))


def allot(training: TrainingSettings, missing: Tensor, step: int) -> Tensor:
    """int64 [K]: samples of a step for K requests, one a worker each and the rest of `forget_batch` by `missing`."""
    rest = max(0, training.forget_batch - len(missing) * training.workers)
    more = pick_by_weight(missing, _positions(step, rest))
    return training.workers + torch.bincount(more, minlength=len(missing))


def micro_batches(training: TrainingSettings, samples: Tensor, rank: int, world: int) -> list[tuple[Tensor, float]]:
    """A worker's part of an objective's samples, a micro-batch each, with what its mean loss is to be scaled by.

    So scaled, the mean over micro-batches and workers is the mean over all samples, whether or not they divide. Every
    worker has the same number of micro-batches, as they all take part in each reduction.
    """
    shares = [samples[r::world] for r in range(world)]
    most, least = len(shares[0]), len(shares[-1])
    assert least > 0, f"{len(samples)} samples for {world} workers"
    count = min(least, math.ceil(most / training.micro_batch)) if training.micro_batch else 1
    return [(part, len(part) * count * world / len(samples)) for part in shares[rank].tensor_split(count)]


def _positions(step: int, count: int) -> Tensor:
    return step * count + torch.arange(count)


def _rows_of(seed: int, request: int, rows: Tensor, visit: int, count: int) -> Tensor:
    """Rows for the `count` samples of a request at its `visit`-th turn."""
    position = visit * count + torch.arange(count)
    epochs = {int(e): shuffled(seed, "row", int(e), len(rows), request) for e in (position // len(rows)).unique()}
    return rows[torch.stack([epochs[int(p // len(rows))][p % len(rows)] for p in position])]
