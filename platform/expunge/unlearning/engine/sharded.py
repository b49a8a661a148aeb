"""`ShardedEngine`: DeepSpeed around a network, with several objectives a step.

Each objective is backpropagated and reduced over the ranks on its own, and what this rank keeps of it is its shard.
Surgery needs the Gram matrix of the gradients only: Gram of the local shards, one all-reduce of (K + 1)^2 numbers,
coefficients on the host, one combination in place. Extra memory: K shards.

Surgery is in gradient space. What AdamW makes of the combination, dividing it by its own running size, need not be
orthogonal to the retain gradient.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch

# Before deepspeed is imported: what it reads at import time.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist
from deepspeed.ops import __compatible_ops__
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from expunge.settings import TrainingSettings
from expunge.unlearning.engine import checkpoint
from expunge.unlearning.engine.config import deepspeed_config
from expunge.unlearning.engine.precision import keep_times_exact
from expunge.unlearning.engine.shards import Objective, Shard, held_bytes, shards_of
from expunge.unlearning.engine.surgery import (
    StepStatistics,
    bad_objectives,
    check_surgery,
    groups_of,
    operate,
    reduce_grams,
)

# It is for inference only, and compiles for minutes at the first initialisation.
__compatible_ops__["deepspeed_shm_comm"] = False


class ShardedEngine:
    """Wraps a network; `step` takes the objectives in order, the retain objective last."""

    def __init__(self, network: nn.Module, training: TrainingSettings) -> None:
        """Raises InputError when a package that the surgery needs is not installed."""
        check_surgery(training)
        self._training = training
        names = {p: name for name, p in network.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(list(names), lr=training.learning_rate, weight_decay=0.0)
        exact: dict[nn.Parameter, Tensor] = {}
        if training.precision == "bf16":
            keep_times_exact(network, torch.bfloat16)
            exact = {p: p.detach().clone() for p in names}
        self._engine, *_ = deepspeed.initialize(
            model=network,
            optimizer=optimizer,
            model_parameters=list(names),  # pyright: ignore[reportArgumentType]  # a list is what its docs ask for
            config=deepspeed_config(training),
        )
        self._trained = list(names)
        _limit_waiting(training.worker_timeout_s)
        self._shards = shards_of(self._engine.optimizer, list(names))
        # DeepSpeed makes the optimizer's float32 copy from weights that it has already rounded.
        self._shards.set_masters(exact)
        local = [names[p] for p in self._shards.parameters]
        self._groups = groups_of(list(names.values()), local, training.surgery_granularity)

    def step(self, number: int, objectives: Sequence[Sequence[Objective]]) -> StepStatistics:
        """The optimizer step of this number, unless a gradient is not finite: then all stays as it is.

        objectives: at least two; each is one micro-batch or more, the same number on every rank, and its loss is the
        mean of theirs.
        """
        losses = torch.zeros(len(objectives), dtype=torch.float64)
        stash: list[Shard] = []
        for index, micro_batches in enumerate(objectives):
            losses[index] = self._backward(micro_batches)
            if index < len(objectives) - 1:
                stash.append(self._shards.stash())
        shards = [*stash, self._shards.current()]
        self._shards.wait()
        stashed = sum(held_bytes(shard) for shard in stash)
        grams = reduce_grams(shards, self._groups, losses, self.total, disjoint=self._shards.disjoint)
        bad = bad_objectives(grams, losses)
        nan = float("nan")
        if bad:
            self._shards.clear()
            return StepStatistics(losses.tolist(), nan, nan, nan, stashed, bad)
        cosine, conflict, norm = operate(shards, self._groups, grams, self._training, number)
        self._shards.hand_over()
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()
        # Else stage 3 keeps the gradient of a parameter that the next step's first objective does not use.
        self._shards.clear()
        return StepStatistics(losses.tolist(), cosine, conflict, norm, stashed)

    @torch.no_grad()
    def distance_from(self, start: Shard) -> float:
        """Of the trained weights from `start`, which is `weights()` of an earlier moment, relative to its norm.

        Relative to 1 where that is 0. Every rank must ask.
        """
        pairs = zip(self._shards.masters(), start, strict=True)
        sums = [(float((now - then).square().sum()), float(then.square().sum())) for now, then in pairs]
        total = torch.tensor(sums, dtype=torch.float64).sum(0)
        moved, before = (self.total(total) if self._shards.disjoint else total).tolist()
        return (moved / (before or 1.0)) ** 0.5

    def weights(self) -> Shard:
        """A copy of this rank's part of the trained weights."""
        return [master.clone() for master in self._shards.masters()]

    def consolidate(self) -> None:
        """Make the trained weights whole float32 tensors on rank 0, in the network itself. The end: no step follows.

        One tensor at a time crosses the ranks, so no rank but 0 ever holds all of them, and rank 0 once. Every rank
        must call it.
        """
        if self._training.precision == "fp32" and self._training.zero_stage < 3:
            return  # they are already
        for parameter in self._trained:
            whole = safe_get_full_fp32_param(parameter)
            if dist.get_rank() == 0:
                assert whole is not None
                parameter.data = whole.detach().cpu()

    def save(self, folder: Path, step: int) -> Exception | None:
        """Every rank writes its own part; returns what went wrong on this one."""
        return checkpoint.save(self._engine, folder, step)

    def load(self, folder: Path) -> int:
        """Restore from `folder`, written by any number of ranks; returns the steps already done.

        Raises StorageError where it is not readable.
        """
        return checkpoint.load(self._engine, folder)

    def everywhere(self, here: bool) -> bool:
        """Whether it is so on every rank. All must ask."""
        return self.total(torch.tensor([int(not here)])).item() == 0

    def same(self, number: int) -> int:
        """Rank 0's number, on every rank."""
        return int(self.total(torch.tensor([number if dist.get_rank() == 0 else 0])).item())

    def total(self, values: Tensor) -> Tensor:
        """The sum over the ranks, on the host; it may overwrite `values`. Every rank must ask, with the same shape."""
        values = values.to(self._engine.device)
        dist.all_reduce(values)
        return values.cpu()

    def _backward(self, micro_batches: Sequence[Objective]) -> float:
        """Accumulate and reduce the gradient of their mean loss; returns this rank's."""
        total = 0.0
        for index, micro_batch in enumerate(micro_batches):
            self._shards.before_forward()
            loss = micro_batch() / len(micro_batches)
            last = index == len(micro_batches) - 1
            self._engine.set_gradient_accumulation_boundary(last and self._shards.boundary)
            self._engine.backward(loss, scale_wrt_gas=False)
            total += loss.item()
        self._shards.reduce()
        return total


def _limit_waiting(seconds: float) -> None:
    """For a rank that hangs, in every group: DeepSpeed makes some of its own, and they get torch's half an hour."""
    groups = [group for group in distributed_c10d._world.pg_map if isinstance(group, dist.ProcessGroup)]
    for group in groups:
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
