"""The process group of a training's workers: NCCL where their torch can use GPUs, and gloo elsewhere."""

from dataclasses import dataclass, replace

import torch
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend  # a public way to choose after the workers have started does not exist


class _Backend(_TorchBackend):
    """Asks the workers, because the driver may be on another machine: Ray counts GPUs that their torch may not see."""

    def on_start(self, worker_group: BaseWorkerGroup, backend_config: TorchConfig) -> None:
        cuda = all(worker_group.execute(torch.cuda.is_available))
        super().on_start(worker_group, replace(backend_config, backend="nccl" if cuda else "gloo"))


@dataclass
class GpuWorkers(TorchConfig):
    """Ray Train's configuration for workers that have a GPU each."""

    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend
