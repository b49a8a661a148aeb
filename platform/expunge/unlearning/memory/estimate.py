"""Bytes on each GPU, from a model's footprint, for every ZeRO stage and kind of forget gradients.

Bytes per GPU, for P parameters, T of them trained, N GPUs, K forget gradients beside the retain gradient:

- weights: all of them; sharded over the GPUs from stage 3 on. Full fine-tuning holds the frozen model beside
  them, whole and in float32.
- gradient: T; from stage 2 on the reduced shard alone, and at stage 1 both, as it keeps the memory of its shards.
- stash: K shards of T / N; at stage 0, K whole gradients.
- optimizer: float32 moments and weights, 12 bytes per trained parameter, sharded from stage 1 on. In float32, stages 0
  and 3 step the network's own weights and need 8, while 1 and 2 make a copy.
- activations: as the footprint has them.

With the optimizer on the host (stages 1 and 3) its bytes are there, with float32 weights in either precision, a float32
gradient, and T / N numbers more: new weights on their way at stage 1, the reduced gradient at stage 3. There stage 3
has its stash, too.

Not counted: the CUDA context, fragmentation, communication buckets (`RESERVE` stands for them), the text encoders and
the autoencoder, which the training loop does not need.
"""

from dataclasses import asdict, dataclass

import torch

from expunge.settings import OFFLOAD_STAGES
from expunge.unlearning.memory.footprint import Footprint
from expunge.unlearning.objectives import Mode

STAGES = (0, 1, 2, 3)

RESERVE = 0.08
"""The share of a GPU that is left free for what is not counted. A guess: no GPU has run this."""

OFFLOADED_BYTES = 16
"""Bytes per trained parameter in float32 on the host: two moments, the weight, and the gradient."""


@dataclass(frozen=True)
class Estimate:
    """Bytes on each GPU, and of host memory for each."""

    stage: int
    objectives: Mode
    weights: int
    gradient: int
    stash: int
    optimizer: int
    activations: int
    host: int
    """Host memory for the optimizer where that is offloaded; else 0."""

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return self.weights + self.gradient + self.stash + self.optimizer + self.activations

    def fits(self, gpu_bytes: int) -> bool:
        return self.total <= (1 - RESERVE) * gpu_bytes

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "total": self.total}


def estimate(
    footprint: Footprint, stage: int, objectives: Mode, *, gpus: int, requests: int, offload: bool = False
) -> Estimate:
    """Return the bytes per GPU at a ZeRO stage.

    objectives: one forget gradient per request, or one for the whole batch.
    offload: the optimizer is on the host. The stage is then one of OFFLOAD_STAGES.
    """
    f = footprint
    gpus_or_one = gpus if stage >= 1 else 1
    shard = -(-f.trained // gpus_or_one)
    weights = f.parameters * f.weight_bytes
    if stage == 3:
        weights = -(-weights // gpus) + f.largest * f.weight_bytes
    if f.frozen_copy:
        # It stands outside of DeepSpeed: every GPU has all of it, in float32.
        weights += f.parameters * torch.float32.itemsize
    gradient = ((f.trained if stage < 2 else 0) + (shard if stage >= 1 else 0)) * f.weight_bytes
    stash = (requests if objectives == "request" else 1) * shard * f.weight_bytes
    optimizer = shard * (8 if f.weight_bytes == 4 and stage in (0, 3) else 12)
    host = 0
    if offload:
        host, optimizer = shard * (OFFLOADED_BYTES + f.weight_bytes), 0
        if stage == 3:
            host, gradient, stash = host + stash, 0, 0
    return Estimate(stage, objectives, weights, gradient, stash, optimizer, f.activations, host)


def estimates(footprint: Footprint, *, gpus: int, requests: int, offload: bool = False) -> list[Estimate]:
    """Estimate every possible stage with either kind of objectives, in the order of stages."""
    kinds: tuple[Mode, ...] = ("request", "batch")
    return [
        estimate(footprint, stage, kind, gpus=gpus, requests=requests, offload=offload)
        for stage in (OFFLOAD_STAGES if offload else STAGES)
        for kind in kinds
    ]
