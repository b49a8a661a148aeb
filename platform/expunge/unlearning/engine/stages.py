"""Where each ZeRO stage of DeepSpeed 0.19 keeps a rank's shard of a reduced gradient: one class for each way."""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from deepspeed.utils import safe_set_full_fp32_param
from torch import Tensor, nn

from expunge.unlearning.engine.buckets import Bucket, buckets_of
from expunge.unlearning.engine.config import BUCKET
from expunge.unlearning.engine.shards import ReducedGradients, Shard, held_bytes


def reduced_gradients(optimizer: object, parameters: list[nn.Parameter]) -> ReducedGradients:
    """Choose the class for what `deepspeed.initialize` has made of a torch optimizer of `parameters`."""
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return GradientsPartitioned(optimizer) if optimizer.partition_gradients else OptimizerPartitioned(optimizer)
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return ParametersPartitioned(optimizer)
    assert isinstance(optimizer, torch.optim.Optimizer), f"no supported stage makes a {type(optimizer)}"
    return Replicated(optimizer, parameters)


def _second_moments(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Return AdamW's second moments of `weights`, which are stepped together, and the steps in them."""
    states = [optimizer.state[weight] for weight in weights if optimizer.state.get(weight)]
    return [state["exp_avg_sq"] for state in states], int(states[0]["step"]) if states else 0


class Replicated(ReducedGradients):
    """Stage 0: every rank has the whole reduced gradient in `p.grad`."""

    disjoint = False

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        self._optimizer = optimizer
        self.parameters = parameters

    def current(self) -> Shard:
        for parameter in self.parameters:
            if parameter.grad is None:  # an objective need not use every parameter
                parameter.grad = torch.zeros_like(parameter)
        return [cast(Tensor, parameter.grad) for parameter in self.parameters]

    def stash(self) -> Shard:
        taken = self.current()
        self.clear()
        return taken

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def second_moment(self) -> tuple[Shard, int]:
        return _second_moments(self._optimizer, self.parameters)

    def masters(self) -> Shard:
        return [p.detach() for p in self.parameters]

    def set_masters(self, values: Mapping[nn.Parameter, Tensor]) -> None:
        for parameter, value in values.items():
            parameter.detach().copy_(value)


class GradientsPartitioned(ReducedGradients):
    """Stage 2: `averaged_gradients` per group, as pieces of the rank's partition with padding between them."""

    disjoint = True

    def __init__(self, optimizer: DeepSpeedZeroOptimizer) -> None:
        self._optimizer = optimizer
        self.parameters = [p for group in optimizer.params_in_partition for p in group]

    def current(self) -> Shard:
        groups = self._optimizer.averaged_gradients
        return [piece for group in range(len(groups)) for piece in self._real(group, groups[group])]

    def _real(self, group: int, pieces: Sequence[Tensor]) -> Shard:
        """Leave out the padding among the pieces of a group's partition, or among what is cut as they are."""
        gradients = self._optimizer.averaged_gradients[group]
        real = [p for p, like in zip(pieces, gradients, strict=True) if not getattr(like, "_zero_padding", False)]
        # Padding at the end is not always marked as such; pieces come in the order of the parameters.
        return real[: len(self._optimizer.params_in_partition[group])]

    def stash(self) -> Shard:
        pieces = self.current()
        # A tensor that straddles two ranks is whole in memory: copying the part frees the rest.
        exact = held_bytes(pieces) == sum(piece.nbytes for piece in pieces)
        taken = pieces if exact else [piece.clone() for piece in pieces]
        self.clear()
        return taken

    def clear(self) -> None:
        for group in self._optimizer.averaged_gradients:
            self._optimizer.averaged_gradients[group] = None
            self._optimizer.all_grad_tensors[group] = None
        self._optimizer.zero_grad()
        self._optimizer.micro_step_id = -1

    def before_forward(self) -> None:
        self._optimizer.clear_backward_seen_flag()

    def second_moment(self) -> tuple[Shard, int]:
        flat, steps = _second_moments(self._optimizer.optimizer, self._optimizer.single_partition_of_fp32_groups)
        pieces: Shard = []
        for group, moment in enumerate(flat):
            gradients = self._optimizer.averaged_gradients[group]
            parts = moment.split([gradient.numel() for gradient in gradients])
            pieces += self._real(group, [part.view_as(like) for part, like in zip(parts, gradients, strict=True)])
        return pieces, steps

    def masters(self) -> Shard:
        return [p.detach() for p in self._optimizer.single_partition_of_fp32_groups]

    def set_masters(self, values: Mapping[nn.Parameter, Tensor]) -> None:
        for parameter, value in values.items():
            safe_set_full_fp32_param(parameter, value)


class OptimizerPartitioned(GradientsPartitioned):
    """Stage 1: the shards lie where stage 2 has them, but the reduction is our own, one for all micro-batches.

    A rank needs the mean of its own partition only, so every rank sends each other rank just that rank's part. This is
    half of what an all-reduce sends: two gradients cost what one costs in DeepSpeed, without its hooks, copies and norm
    for every tensor. The last bucket travels while the next objective is computed. Buffers are kept from step to step,
    because allocating them costs more than filling them. And surgery still finds the gradient: DeepSpeed's own
    reduction would already have given it to an optimizer on the host.
    """

    boundary = False

    def __init__(self, optimizer: DeepSpeedZeroOptimizer) -> None:
        super().__init__(optimizer)
        self._world = dist.get_world_size()
        self._buckets = [
            buckets_of([p.numel() for p in parameters], offsets, len(partition), self._world, BUCKET)
            for parameters, offsets, partition in zip(
                optimizer.round_robin_bit16_groups,
                optimizer.round_robin_bit16_offsets,
                optimizer.single_partition_of_fp32_groups,
                strict=True,
            )
        ]
        widest = max(bucket.end - bucket.begin for buckets in self._buckets for bucket in buckets)
        self._sent, self._received = torch.empty(
            2,
            self._world * widest if self._world > 1 else 0,
            dtype=optimizer.gradient_accumulation_dtype,
            device=optimizer.round_robin_bit16_groups[0][0].device,
        )
        self._made: list[list[GradPartitionBufferGroup]] = []
        """A step's shards in the order of its objectives, each by group: K to stash, and the current one."""
        self._next = 0
        self._arrive: Callable[[], None] | None = None

    def reduce(self) -> None:
        groups = range(len(self._buckets))
        if self._next == len(self._made):
            self._made.append([self._optimizer._build_compact_grad_partition_buffer(group) for group in groups])
        for group, pieces in enumerate(self._made[self._next]):
            gradients = [self._gradient(p) for p in self._optimizer.round_robin_bit16_groups[group]]
            for bucket in self._buckets[group]:
                self._send(bucket, gradients, pieces.flat_partition[bucket.begin : bucket.end])
            self._optimizer.averaged_gradients[group] = pieces
        self._next += 1
        self._optimizer.zero_grad()

    def wait(self) -> None:
        if self._arrive is not None:
            self._arrive()
            self._arrive = None

    def _send(self, bucket: Bucket, gradients: Sequence[Tensor], mine: Tensor) -> None:
        """Write the mean over the ranks into `mine`. One bucket travels at a time, which bounds the memory."""
        self.wait()
        if self._world == 1:
            bucket.fill(mine, gradients)
            return
        count = self._world * len(mine)
        sent, received = self._sent[:count], self._received[:count]
        bucket.fill(sent, gradients)
        # Not reduce_scatter: gloo builds it from an all-reduce. And this sum is in rank order, the same every time.
        sending = dist.all_to_all_single(received, sent, async_op=True)
        assert sending is not None

        def arrive() -> None:
            sending.wait()
            torch.mean(received.view(self._world, -1), 0, out=mine)

        self._arrive = arrive

    def stash(self) -> Shard:
        pieces = self.current()
        super().clear()
        return pieces

    def clear(self) -> None:
        super().clear()
        self._next = 0

    def hand_over(self) -> None:
        if self._optimizer.cpu_offload:
            for group, master in enumerate(self._optimizer.single_partition_of_fp32_groups):
                assert master.grad is not None
                master.grad.copy_(self._optimizer.averaged_gradients[group].flat_partition)

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        gradient = self._optimizer.get_gradient_for_reduction(parameter)
        if gradient is None:  # an objective need not use every parameter
            gradient = torch.zeros_like(parameter, dtype=self._optimizer.gradient_accumulation_dtype)
        return gradient.view(-1)


class ParametersPartitioned(ReducedGradients):
    """Stage 3: one flat buffer that every backward pass writes to; it is on the host if the optimizer is."""

    disjoint = True
    # Every backward pass reduces. At a boundary DeepSpeed would already give the sum to an optimizer on the host.
    boundary = False

    def __init__(self, optimizer: DeepSpeedZeroOptimizer_Stage3) -> None:
        self._optimizer = optimizer
        self.parameters = [p for group in optimizer.fp16_groups for p in group]

    def current(self) -> Shard:
        sizes = [p.partition_numel() for p in self.parameters]  # pyright: ignore[reportAttributeAccessIssue]
        return list(self._optimizer.grad_partitions_flat_buffer.split(sizes))

    def stash(self) -> Shard:
        taken = [piece.clone() for piece in self.current()]
        self.clear()
        return taken

    def clear(self) -> None:
        self._optimizer.zero_grad()
        # Otherwise a parameter that the next objective does not use would keep this one's gradient.
        self._optimizer.grad_partitions_flat_buffer.zero_()

    def hand_over(self) -> None:
        if self._optimizer.offload_optimizer:
            masters = self._optimizer.fp32_partitioned_groups_flat
            parts = self._optimizer.grad_partitions_flat_buffer.split([len(master) for master in masters])
            for master, part in zip(masters, parts, strict=True):
                master.grad.copy_(part)

    def before_forward(self) -> None:
        self._optimizer.clear_backward_seen_flag()

    def second_moment(self) -> tuple[Shard, int]:
        flat, steps = _second_moments(self._optimizer.optimizer, self._optimizer.fp32_partitioned_groups_flat)
        return self._cut(flat) if flat else [], steps

    def masters(self) -> Shard:
        parts = self._cut([flat.detach() for flat in self._optimizer.fp32_partitioned_groups_flat])
        # The padding of a tensor on its last rank was never written and may hold anything.
        return [
            part[: max(0, p.ds_numel - dist.get_rank() * len(part))]  # pyright: ignore[reportAttributeAccessIssue]
            for p, part in zip(self.parameters, parts, strict=True)
        ]

    def _cut(self, flat: Sequence[Tensor]) -> Shard:
        """Cut a flat tensor of each group into the parts of its parameters, which are views of it."""
        groups = zip(flat, self._optimizer.fp16_groups, strict=True)
        return [part for whole, group in groups for part in whole.split([p.partition_numel() for p in group])]

    def set_masters(self, values: Mapping[nn.Parameter, Tensor]) -> None:
        # DeepSpeed's own function fails where a tensor does not divide among the ranks.
        for parameter, piece in zip(self.parameters, self.masters(), strict=True):
            if parameter in values:
                first = dist.get_rank() * parameter.partition_numel()  # pyright: ignore[reportAttributeAccessIssue]
                piece.copy_(values[parameter].flatten()[first : first + piece.numel()])
