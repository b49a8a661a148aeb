"""The choice of a ZeRO stage and of the forget gradients: per request where there is room for them."""

import math

import pytest

from expunge.settings import TrainingSettings
from expunge.unlearning.memory import Footprint, choose, estimates, objectives_that_fit
from expunge.unlearning.memory.estimate import RESERVE

TRAINING = TrainingSettings.model_validate({"precision": "bf16"})


def test_gradients_per_request_where_any_stage_holds_them_else_one_for_all_else_nothing() -> None:
    f = Footprint(10**9, 10**9, False, 2, 10**7, 0)
    options = estimates(f, gpus=8, requests=32)
    roomy, tight, tiny = (choose(options, n * 10**9) for n in (100, 8, 1))
    assert roomy is not None
    assert (roomy.stage, roomy.objectives) == (1, "request")
    assert tight is not None
    assert (tight.stage, tight.objectives) == (1, "batch")
    assert tiny is None


@pytest.mark.parametrize(("requests", "objectives"), [(1, "request"), (10, "request"), (11, "batch"), (500, "batch")])
def test_auto_keeps_gradients_apart_up_to_the_last_stash_that_fits(requests: int, objectives: str) -> None:
    """Stage 1 on two GPUs: weights 2, gradient 2 and 1, a stash of 1 per request, an optimizer of 6 MB: 21 with ten."""
    f = Footprint(10**6, 10**6, False, 2, 10**4, 0)
    room = math.ceil(21e6 / (1 - RESERVE))
    training = TRAINING.model_copy(update={"forget_batch": 1000})
    assert objectives_that_fit(f, training, gpus=2, requests=requests, gpu_bytes=room) == objectives


@pytest.mark.parametrize(("requests", "objectives"), [(4, "request"), (5, "batch")])
def test_auto_adds_no_sample_to_a_step(requests: int, objectives: str) -> None:
    """Eight forget samples on two workers: four each, for as many gradients."""
    assert (TRAINING.forget_batch, TRAINING.workers) == (8, 2)
    f = Footprint(10**6, 10**6, False, 2, 10**4, 0)
    assert objectives_that_fit(f, TRAINING, gpus=2, requests=requests, gpu_bytes=10**12) == objectives
