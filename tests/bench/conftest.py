"""A lesson on a toy model, for everything that needs no real one."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from expunge.bench.lesson import Lesson
from expunge.preparation.dataset import ForgetSet, RetainSet
from expunge.settings import TrainingSettings
from tests.unlearning.conftest import Toy

MakeLesson = Callable[..., Lesson]
TARGETS, OTHERS = 6, 10


@pytest.fixture(params=["flow", "epsilon", "v_prediction"])
def toy(request: pytest.FixtureRequest) -> Toy:
    return Toy(request.param)


@pytest.fixture
def make_lesson(toy: Toy) -> MakeLesson:
    """Two requests: rows 0 to 2 under a prompt of their own (row 1), the others under the empty prompt (row 0)."""

    def make(model: Toy = toy, **settings: object) -> Lesson:
        base = copy.deepcopy(model.network)

        @contextmanager
        def frozen() -> Iterator[None]:
            trained, model.network = model.network, base
            try:
                yield
            finally:
                model.network = trained

        generator = torch.Generator().manual_seed(1)
        x_f, x_s = (torch.randn(TARGETS, 2, 4, 4, generator=generator) for _ in range(2))
        forget = ForgetSet(x_f, x_s, torch.tensor([1, 1, 1, 0, 0, 0]), torch.tensor([0, 0, 0, 1, 1, 1]))
        retain = RetainSet(torch.randn(OTHERS, 2, 4, 4, generator=generator), torch.zeros(OTHERS, dtype=torch.long))
        given = {"workers": 1, "forget_batch": 4, "retain_batch": 6, **settings}
        return Lesson(
            model=model,
            frozen=frozen,
            training=TrainingSettings.model_validate(given),
            forget=forget,
            retain=retain,
            conditioning=model.condition(["", "a prompt of nine"]),
            empty=model.condition([""]),
            mode="request",
        )

    return make


@pytest.fixture
def lesson(make_lesson: MakeLesson) -> Lesson:
    return make_lesson()
