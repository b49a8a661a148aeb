"""Where a stage runs: on a GPU where Ray has one, unless `training.device` says otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ray

from expunge.errors import InputError
from expunge.settings import ClusterSettings

if TYPE_CHECKING:
    import torch


def gpus_for(cluster: ClusterSettings) -> int:
    """Return how many GPUs Ray has for a job's stages; 0 if they are to run on CPUs.

    Raises InputError if GPUs are required, and Ray has none.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if cluster.device == "gpu" and gpus == 0:
        raise InputError("training.device: gpu, but Ray has no GPU", hint="add a node, or set it to cpu or auto")
    return 0 if cluster.device == "cpu" else gpus


def resources(cluster: ClusterSettings) -> dict[str, float]:
    """Return what a stage's task asks Ray for, as arguments of `options`. Raises InputError as `gpus_for` does."""
    return {"num_cpus": 1, "num_gpus": 1 if gpus_for(cluster) else 0}


def device() -> torch.device:
    """Return the device of this process: in a task of Ray, the GPU that it was given; elsewhere, the first there is."""
    # Not at the top: drivers, which only ask for resources, need not wait for it.
    import torch

    given = not ray.is_initialized() or bool(ray.get_gpu_ids())
    return usable(torch.device("cuda" if given else "cpu"))


def usable(device: torch.device) -> torch.device:
    """Return a GPU ready to compute on, or the CPU where torch cannot use it, such as a CPU build of torch."""
    import torch

    if device.type != "cuda" or not torch.cuda.is_available():
        return torch.device("cpu")
    # What is computed in float32 is so for its range and its weights' exactness: TF32 keeps both, at 8 times the rate.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return device
