"""The sharded engine: the only module that touches DeepSpeed (0.19, ZeRO stage 1).

A step has several objectives. Each is backpropagated and reduced over the ranks on its own; what this rank keeps of a
reduced gradient is its shard. Surgery needs the Gram matrix of the gradients only: Gram of the local shards, one
all-reduce of K x K numbers, coefficients on the host, one in-place combination. No gradient is ever gathered.

The shard lives in DeepSpeed internals (`averaged_gradients`), hence the pinned range and the test against plain torch.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

# Before deepspeed is imported: what it reads at import time.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist
from deepspeed.ops import __compatible_ops__
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from expunge.errors import StorageError
from expunge.settings import TrainingSettings
from unlearn_kernels import clip_coefficient, combine_, conflicts, cosines, gram, retain_normal

# It is for inference only, and compiles for minutes at the first initialisation.
__compatible_ops__["deepspeed_shm_comm"] = False

Shard = list[Tensor]


@dataclass(frozen=True)
class StepStatistics:
    """Of one surgery: cosine of the forget to the retain gradient, share of conflicts, norm before the clip."""

    cosine: float
    conflict: float
    norm: float


class ShardedEngine:
    """Wraps a network; `step` takes the objectives in order, the retain objective last."""

    def __init__(self, network: nn.Module, training: TrainingSettings) -> None:
        self._training = training
        parameters = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.0)
        self._engine, *_ = deepspeed.initialize(
            model=network,
            optimizer=optimizer,
            model_parameters=parameters,  # pyright: ignore[reportArgumentType]  # a list is what its docs ask for
            config=_config(training),
        )
        self._zero = cast(DeepSpeedZeroOptimizer, self._engine.optimizer)
        self._padded: list[Shard] = []

    def step(self, objectives: Sequence[Callable[[], Tensor]]) -> tuple[list[float], StepStatistics]:
        """One optimizer step; returns this rank's losses in order, and statistics that are equal on every rank."""
        losses, shards = [], []
        for objective in objectives:
            loss = objective()
            self._engine.set_gradient_accumulation_boundary(True)
            self._engine.backward(loss, scale_wrt_gas=False)
            shards.append(self._take_shard())
            losses.append(loss.item())
        statistics = self._combine(shards)
        self._put_shard(shards[-1])
        self._engine.step()
        return losses, statistics

    def save(self, folder: Path, step: int) -> None:
        """Every rank writes its own part."""
        self._engine.save_checkpoint(str(folder), tag=f"step-{step}", client_state={"step": step})

    def load(self, folder: Path) -> int:
        """Restore from `folder`; returns the steps already done. Raises StorageError where it is not readable."""
        path, client = self._engine.load_checkpoint(str(folder))
        if path is None or client is None:
            raise StorageError(
                f"the checkpoint in {folder} cannot be loaded", mend="delete it, and submit the night again"
            )
        return int(client["step"])

    def _combine(self, shards: list[Shard]) -> StepStatistics:
        """Write the clipped combination of all gradients over the last shard."""
        matrix = gram(shards)
        if dist.get_world_size() > 1:
            dist.all_reduce(matrix)  # stage 1 shards are disjoint, so the dot products add up
        count = len(shards)
        if self._training.surgery == "retain_normal":
            coefficients = retain_normal(matrix, self._training.forget_weight)
        else:
            weights = [self._training.forget_weight / (count - 1)] * (count - 1)
            coefficients = torch.tensor([*weights, 1.0], dtype=torch.float64)
        clip = clip_coefficient(matrix, coefficients, self._training.clip)
        combine_(shards[-1], shards, coefficients * clip)
        norm = (coefficients @ matrix @ coefficients).clamp_min(0).sqrt().item()
        return StepStatistics(cosines(matrix).mean().item(), conflicts(matrix).double().mean().item(), norm)

    def _take_shard(self) -> Shard:
        """This rank's part of the reduced gradient: taken over, not copied, as the next backward allocates anew."""
        optimizer = self._zero
        self._padded = [list(optimizer.averaged_gradients[group]) for group in sorted(optimizer.averaged_gradients)]
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None
        optimizer.zero_grad()
        optimizer.micro_step_id = -1
        return [piece for pieces in self._padded for piece in pieces if not _is_padding(piece)]

    def _put_shard(self, shard: Shard) -> None:
        """Hand the combined gradient to the optimizer, padding back in its place."""
        rest = iter(shard)
        optimizer = self._zero
        for group, pieces in enumerate(self._padded):
            optimizer.averaged_gradients[group] = [p if _is_padding(p) else next(rest) for p in pieces]


def _is_padding(piece: Tensor) -> bool:
    return getattr(piece, "_zero_padding", False)  # DeepSpeed's own mark on what aligns a partition


def _config(training: TrainingSettings) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": max(1, training.forget_batch // training.workers),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # explicit, as the default is 1.0: the clip is folded into the surgery's coefficients
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": training.zero_stage,
            "reduce_bucket_size": 5_000_000,
            "allgather_bucket_size": 5_000_000,
        },
    }
