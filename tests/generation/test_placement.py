"""A stage asks Ray for a GPU where there is one; without CUDA it computes on the CPU all the same."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ray

from expunge.errors import InputError
from expunge.generation.placement import device, resources
from expunge.unlearning.settings import ClusterSettings


@contextmanager
def ray_with(gpus: int) -> Iterator[None]:
    """A Ray that believes in so many GPUs."""
    ray.init("local", num_cpus=1, num_gpus=gpus, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@ray.remote
def granted() -> tuple[int, str]:
    return len(ray.get_gpu_ids()), device().type


def test_a_stage_asks_for_a_gpu_where_ray_has_one() -> None:
    with ray_with(gpus=4):
        for wanted, gpus in (("auto", 1), ("gpu", 1), ("cpu", 0)):
            asked = resources(ClusterSettings.model_validate({"device": wanted}))
            assert asked == {"num_cpus": 1, "num_gpus": gpus}
            assert ray.get(granted.options(**asked).remote())[0] == gpus


def test_gpus_that_are_not_there_are_refused() -> None:
    with ray_with(gpus=0):
        assert resources(ClusterSettings()) == {"num_cpus": 1, "num_gpus": 0}
        with pytest.raises(InputError, match=r"training\.device: gpu, but Ray has no GPU"):
            resources(ClusterSettings(device="gpu"))
