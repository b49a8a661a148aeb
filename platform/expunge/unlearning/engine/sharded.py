"""`ShardedEngine`: DeepSpeed around a network, with several objectives per step.

An objective is a loss with a gradient of its own. Each is backpropagated and reduced over the ranks separately, and the
part of it that this rank keeps is a shard. Surgery needs nothing but the Gram matrix of the gradients: inner products
of the local shards, one all-reduce of (K + 1)^2 numbers, coefficients on the host, and one combination in place. The
extra memory is K shards. `geometry.py` says which inner products.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch

# DeepSpeed reads this when it is imported.
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
from expunge.unlearning.engine.geometry import SecondMoment
from expunge.unlearning.engine.precision import keep_times_exact
from expunge.unlearning.engine.shards import Shard, held_bytes
from expunge.unlearning.engine.stages import reduced_gradients
from expunge.unlearning.engine.surgery import (
    StepStatistics,
    bad_objectives,
    check_surgery,
    groups_of,
    operate,
    reduce_grams,
)

# This operator is for inference only, and the first initialisation would compile it for minutes.
__compatible_ops__["deepspeed_shm_comm"] = False

MicroBatch = Callable[[], Tensor]
"""Runs the network on one micro-batch and returns a scalar loss."""


class ShardedEngine:
    """Wraps a network; `step` takes the objectives in order, with the retain objective last."""

    def __init__(self, network: nn.Module, training: TrainingSettings) -> None:
        """Raise InputError if a package that the surgery needs is not installed."""
        check_surgery(training)
        self._training = training
        names = {p: name for name, p in network.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(list(names), lr=training.rate("full"), weight_decay=0.0)
        exact: dict[nn.Parameter, Tensor] = {}
        if training.precision == "bf16":
            keep_times_exact(network, torch.bfloat16)
            exact = {p: p.detach().clone() for p in names}
        self._engine, *_ = deepspeed.initialize(
            model=network,
            optimizer=self._optimizer,
            model_parameters=list(names),  # pyright: ignore[reportArgumentType]  # its documentation asks for a list
            config=deepspeed_config(training),
        )
        self._trained = list(names)
        _limit_waiting(training.worker_timeout_s)
        self._gradients = reduced_gradients(self._engine.optimizer, list(names))
        # DeepSpeed makes the optimizer's float32 copy from weights that it has already rounded.
        self._gradients.set_masters(exact)
        local = [names[p] for p in self._gradients.parameters]
        self._groups = groups_of(list(names.values()), local, training.surgery_granularity)

    def step(self, number: int, objectives: Sequence[Sequence[MicroBatch]]) -> StepStatistics:
        """Make optimizer step `number`; if a gradient is not finite, change nothing.

        objectives: at least two. Each consists of one or more micro-batches, the same number on every rank; its loss is
        the mean of theirs.
        """
        losses = torch.zeros(len(objectives), dtype=torch.float64)
        stash: list[Shard] = []
        for index, micro_batches in enumerate(objectives):
            losses[index] = self._backward(micro_batches)
            if index < len(objectives) - 1:
                stash.append(self._gradients.stash())
        shards = [*stash, self._gradients.current()]
        self._gradients.wait()
        stashed = sum(held_bytes(shard) for shard in stash)
        moment = self._second_moment() if self._training.surgery_geometry == "optimizer" else None
        grams = reduce_grams(shards, self._groups, moment, losses, self.total, disjoint=self._gradients.disjoint)
        bad = bad_objectives(grams, losses)
        nan = float("nan")
        if bad:
            self._gradients.clear()
            return StepStatistics(losses.tolist(), nan, nan, nan, stashed, bad)
        cosine, conflict, norm = operate(shards, self._groups, grams, self._training, number)
        self._gradients.hand_over()
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.step()
        # Otherwise stage 3 keeps the gradient of a parameter that the next step's first objective does not use.
        self._gradients.clear()
        return StepStatistics(losses.tolist(), cosine, conflict, norm, stashed)

    def set_rate(self, rate: float) -> None:
        """Make the following steps at this learning rate."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    @torch.no_grad()
    def distance_from(self, start: Shard) -> float:
        """Return how far the trained weights are from `start`, an earlier `weights()`, relative to its norm.

        If that norm is 0, the distance is absolute. Every rank must call it.
        """
        pairs = zip(self._gradients.masters(), start, strict=True)
        sums = [(float((now - then).square().sum()), float(then.square().sum())) for now, then in pairs]
        total = torch.tensor(sums, dtype=torch.float64).sum(0)
        moved, before = (self.total(total) if self._gradients.disjoint else total).tolist()
        return (moved / (before or 1.0)) ** 0.5

    def weights(self) -> Shard:
        """Copy this rank's part of the trained weights."""
        return [master.clone() for master in self._gradients.masters()]

    def consolidate(self) -> None:
        """Turn the trained weights into whole float32 tensors, in the network of rank 0. No step may follow.

        One tensor at a time crosses the ranks, so only rank 0 ever holds all of them, and only once. Every rank must
        call it.
        """
        if self._training.precision == "fp32" and self._training.zero_stage < 3:
            return  # they already are
        for parameter in self._trained:
            whole = safe_get_full_fp32_param(parameter)
            if dist.get_rank() == 0:
                assert whole is not None
                parameter.data = whole.detach().cpu()

    def save(self, folder: Path, step: int) -> Exception | None:
        """Write this rank's part of a checkpoint; return the error if one occurred here. Every rank must call it."""
        return checkpoint.save(self._engine, folder, step)

    def load(self, folder: Path) -> int:
        """Restore a checkpoint that any number of ranks has written; return the number of steps done.

        Raises StorageError if it is not readable.
        """
        return checkpoint.load(self._engine, folder)

    def everywhere(self, here: bool) -> bool:
        """Return whether `here` is true on every rank. Every rank must call it."""
        return self.total(torch.tensor([int(not here)])).item() == 0

    def same(self, number: int) -> int:
        """Return rank 0's number on every rank. Every rank must call it."""
        return int(self.total(torch.tensor([number if dist.get_rank() == 0 else 0])).item())

    def total(self, values: Tensor) -> Tensor:
        """Sum over the ranks, on the host; may overwrite `values`. Every rank must call it, with the same shape."""
        values = values.to(self._engine.device)
        dist.all_reduce(values)
        return values.cpu()

    def _second_moment(self) -> SecondMoment:
        pieces, steps = self._gradients.second_moment()
        return SecondMoment(pieces, steps, self._optimizer.defaults["betas"][1], self._optimizer.defaults["eps"])

    def _backward(self, micro_batches: Sequence[MicroBatch]) -> float:
        """Accumulate and reduce the gradient of the mean loss of micro-batches; return this rank's mean loss."""
        total = 0.0
        for index, micro_batch in enumerate(micro_batches):
            self._gradients.before_forward()
            loss = micro_batch() / len(micro_batches)
            last = index == len(micro_batches) - 1
            self._engine.set_gradient_accumulation_boundary(last and self._gradients.boundary)
            self._engine.backward(loss, scale_wrt_gas=False)
            total += loss.item()
        self._gradients.reduce()
        return total


def _limit_waiting(seconds: float) -> None:
    """Bound the wait for a rank that hangs, in every group: those that DeepSpeed makes get torch's half an hour."""
    groups = [group for group in distributed_c10d._world.pg_map if isinstance(group, dist.ProcessGroup)]
    for group in groups:
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
