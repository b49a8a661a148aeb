"""A stage asks Ray for a GPU where there is one; without CUDA it computes on the CPU all the same."""

from collections.abc import Iterator

import pytest
import ray

from expunge.errors import InputError
from expunge.generation.placement import device, resources
from expunge.unlearning.settings import ClusterSettings


@pytest.fixture(scope="module")
def four_gpus() -> Iterator[None]:
    """A Ray that believes in four GPUs."""
    ray.init("local", num_cpus=1, num_gpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@ray.remote
def granted() -> tuple[int, str]:
    return len(ray.get_gpu_ids()), device().type


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(("wanted", "gpus"), [("auto", 1), ("gpu", 1), ("cpu", 0)])
def test_a_stage_asks_for_a_gpu_where_ray_has_one(wanted: str, gpus: int) -> None:
    asked = resources(ClusterSettings.model_validate({"device": wanted}))
    assert asked == {"num_cpus": 1, "num_gpus": gpus}
    assert ray.get(granted.options(**asked).remote())[0] == gpus


def test_gpus_that_are_not_there_are_refused() -> None:
    ray.init("local", num_cpus=1, num_gpus=0, include_dashboard=False, log_to_driver=False)
    try:
        assert resources(ClusterSettings()) == {"num_cpus": 1, "num_gpus": 0}
        with pytest.raises(InputError, match=r"training\.device: gpu, but Ray has no GPU"):
            resources(ClusterSettings(device="gpu"))
    finally:
        ray.shutdown()
