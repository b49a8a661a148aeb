"""What all arms share: the optimizer's steps, the clip, gradients that are not finite, and the product's own step."""

import copy

import pytest
import torch

from expunge.bench.lesson import Gradient, Lesson, Method
from expunge.bench.product import check, mode_of, product
from expunge.bench.training import descend
from expunge.errors import InputError
from expunge.settings import TrainingSettings
from expunge.unlearning.losses import Losses
from expunge.unlearning.steps import Steps
from tests.bench.conftest import MakeLesson
from tests.unlearning import plain


def ones(lesson: Lesson, step: int) -> Gradient:
    return [torch.ones_like(weight) for weight in lesson.weights]


def test_it_steps_as_adamw_does_at_each_rate_and_clips_first(make_lesson: MakeLesson) -> None:
    lesson, rates = make_lesson(clip=0.5), [0.1, 0.05]
    wanted = [copy.deepcopy(weight) for weight in lesson.weights]
    adamw = torch.optim.AdamW(wanted, weight_decay=0.0)
    norm = sum(weight.numel() for weight in wanted) ** 0.5
    for rate in rates:
        adamw.param_groups[0]["lr"] = rate
        for weight in wanted:
            weight.grad = torch.full_like(weight, 0.5 / norm)
        adamw.step()
    assert descend(lesson, ones, rates) == (2, False)
    for weight, expected in zip(lesson.weights, wanted, strict=True):
        torch.testing.assert_close(weight, expected)


def test_a_bad_step_is_skipped_and_several_in_a_row_end_the_training(make_lesson: MakeLesson) -> None:
    def bad_at(*steps: int) -> Method:
        def method(lesson: Lesson, step: int) -> Gradient:
            return [part * (float("nan") if step in steps else 1.0) for part in ones(lesson, step)]

        return method

    lesson = make_lesson(max_bad_steps=2)
    assert descend(lesson, bad_at(1, 3), [0.1] * 5) == (5, False)
    before = [weight.clone() for weight in lesson.weights]
    assert descend(lesson, bad_at(0, 1, 2), [0.1] * 5) == (2, True)
    assert all(torch.equal(*pair) for pair in zip(before, lesson.weights, strict=True))


@pytest.mark.parametrize("surgery", ["none", "retain_normal", "pcgrad"])
def test_the_product_s_step_is_that_of_the_engine_s_oracle(make_lesson: MakeLesson, surgery: str) -> None:
    lesson = make_lesson(surgery=surgery, retain_target="data", clip=1e9)
    losses = Losses(lesson.model, lesson.frozen, lesson.training, lesson.conditioning)
    _, objectives = Steps(losses, lesson.training, lesson.forget, lesson.retain, "request", 0, 1)(4)
    assert len(objectives) == 3  # two requests and the rest
    each = [lesson.gradient(torch.stack([one() for one in micro]).mean()) for micro in objectives]
    vectors = [torch.cat([part.flatten() for part in gradient]).double() for gradient in each]
    wanted = plain.operate(vectors, [torch.arange(len(vectors[0]))], lesson.training, 4).gradient
    found = torch.cat([part.flatten() for part in product(lesson, 4)]).double()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_a_request_has_a_gradient_of_its_own_where_the_product_gives_it_one() -> None:
    training = TrainingSettings(forget_batch=8, workers=2)
    assert [mode_of(training, requests) for requests in (4, 5)] == ["request", "batch"]
    assert mode_of(training.model_copy(update={"objectives": "batch"}), 1) == "batch"


@pytest.mark.parametrize("changed", [{"surgery_geometry": "optimizer"}, {"adaptive": True}, {"precision": "bf16"}])
def test_what_only_the_engine_follows_is_refused(changed: dict[str, object]) -> None:
    check(TrainingSettings())
    with pytest.raises(InputError, match=f"training.{next(iter(changed))}"):
        check(TrainingSettings.model_validate(changed))
