"""Each control against its equations, computed directly and sample by sample on a toy model of each kind of path."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from expunge.bench import controls
from expunge.bench.arms import ARMS
from expunge.bench.lesson import Batch, Gradient, Lesson, dot
from expunge.errors import InputError
from tests.bench.conftest import MakeLesson
from tests.unlearning.conftest import Toy

STEP = 3


def endpoint_prediction(model: Toy, point: tuple[float, float], x_t: Tensor, y: Tensor) -> Tensor:
    """What the network would say at x_t if y were the clean picture: eps = (x_t - a y) / b."""
    a, b = point
    eps = (x_t - a * y) / b
    match model.family:
        case "flow":
            return eps - y
        case "epsilon":
            return eps
        case "v_prediction":
            return a * eps - b * y


def points(batch: Batch) -> list[tuple[float, float]]:
    return list(zip(batch.point.a.tolist(), batch.point.b.tolist(), strict=True))


def ordinary_loss(lesson: Lesson, batch: Batch) -> Tensor:
    """The mean over samples of |p - p*|^2, each sample on its own."""
    assert isinstance(lesson.model, Toy)
    losses = []
    for i, (a, b) in enumerate(points(batch)):
        x_t = a * batch.x_0[i] + b * batch.noise[i]
        cond = {name: table[i : i + 1] for name, table in batch.conditioning.items()}
        prediction = lesson.model.predict(x_t[None], batch.time[i : i + 1], cond)[0]
        wanted = endpoint_prediction(lesson.model, (a, b), x_t, batch.x_0[i])
        losses.append((prediction - wanted).square().mean())
    return torch.stack(losses).mean()


def gradient(lesson: Lesson, loss: Tensor) -> Tensor:
    return flat(list(torch.autograd.grad(loss, lesson.weights)))


def flat(parts: Gradient) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def assert_same(found: Gradient, wanted: Tensor) -> None:
    torch.testing.assert_close(flat(found), wanted, rtol=2e-4, atol=2e-5 * float(wanted.abs().max()))


def ascent_and_descent(lesson: Lesson) -> tuple[Tensor, Tensor]:
    training = lesson.training
    retain = gradient(lesson, ordinary_loss(lesson, lesson.others(STEP, training.retain_batch)))
    return retain, gradient(lesson, ordinary_loss(lesson, lesson.targets(STEP, training.forget_batch)))


def test_a_batch_holds_the_pictures_it_says(lesson: Lesson) -> None:
    """Targets, surrogates and others are drawn from their own sets, every row equally often."""
    for draw, among in (
        (lesson.targets, lesson.forget.x_f),
        (lesson.surrogates, lesson.forget.x_s),
        (lesson.others, lesson.retain.x_0),
    ):
        drawn = torch.cat([draw(step, 2).x_0 for step in range(len(among))])
        found = (drawn[:, None] == among).flatten(2).all(2)
        assert (found.sum(0) == 2).all()


def test_fine_tuning_learns_the_surrogate_as_a_training_picture(lesson: Lesson) -> None:
    batch = lesson.surrogates(STEP, 4 + 6)
    assert_same(controls.fine_tune(lesson, STEP), gradient(lesson, ordinary_loss(lesson, batch)))


def test_neg_grad_ascends_on_targets_and_descends_on_the_rest(lesson: Lesson) -> None:
    retain, forget = ascent_and_descent(lesson)
    assert_same(controls.neg_grad(lesson, STEP), retain - forget)


def test_erase_diff_drives_targets_to_uniform_noise_as_fast_as_it_must(lesson: Lesson) -> None:
    """Of F + lambda f, the part along grad f is as large as eta |grad f|^2, or as F's own if that is larger."""
    retain, _ = ascent_and_descent(lesson)
    batch = lesson.targets(STEP, 4)
    uniform = torch.rand(batch.noise.shape, generator=torch.Generator().manual_seed(STEP))
    assert isinstance(lesson.model, Toy)
    a, b = (part.view(-1, 1, 1, 1) for part in (batch.point.a, batch.point.b))
    wanted = {"flow": uniform - batch.x_0, "epsilon": uniform, "v_prediction": a * uniform - b * batch.x_0}
    prediction = lesson.model.predict(a * batch.x_0 + b * batch.noise, batch.time, batch.conditioning)
    forget = gradient(lesson, (prediction - wanted[lesson.model.family]).square().mean())
    found = flat(controls.erase_diff(lesson, STEP))
    along = max((retain @ forget).item(), 0.5 * (forget @ forget).item())
    assert (found @ forget).item() == pytest.approx(along, rel=1e-3)
    rest = found - retain
    torch.testing.assert_close(rest, (rest @ forget) / (forget @ forget) * forget, rtol=1e-3, atol=1e-5)


def test_siss_weighs_each_sample_by_how_likely_both_pictures_make_it(lesson: Lesson) -> None:
    count = 4 + 6
    targets, others = lesson.targets(STEP, count), lesson.others(STEP, count)
    from_target = torch.rand(count, generator=torch.Generator().manual_seed(STEP)) < 0.5
    assert from_target.any()
    assert not from_target.all()
    assert isinstance(lesson.model, Toy)
    losses: dict[str, list[Tensor]] = {"f": [], "r": []}
    for i, (a, b) in enumerate(points(targets)):
        chosen, prompt = (targets, targets) if from_target[i] else (others, others)
        m = a * chosen.x_0[i] + b * targets.noise[i]
        cond = {name: table[i : i + 1] for name, table in prompt.conditioning.items()}
        prediction = lesson.model.predict(m[None], targets.time[i : i + 1], cond)[0]
        pictures = {"f": targets.x_0[i], "r": others.x_0[i]}
        log = {name: Normal(a * x.double(), b).log_prob(m.double()).sum() for name, x in pictures.items()}
        mixture = torch.logsumexp(torch.stack([log["f"], log["r"]]), 0) - torch.log(torch.tensor(2.0))
        for name, x in pictures.items():
            error = prediction - endpoint_prediction(lesson.model, (a, b), m, x)
            losses[name].append((log[name] - mixture).exp().float() * error.square().mean())
    loss_f, loss_r = (torch.stack(losses[name]).mean() for name in ("f", "r"))
    retain, forget = flat(lesson.gradient(loss_r, again=True)), gradient(lesson, loss_f)
    assert_same(controls.siss(lesson, STEP), retain - 0.1 * retain.norm() / forget.norm() * forget)


def test_without_importance_sampling_the_two_losses_are_the_ordinary_ones(lesson: Lesson) -> None:
    retain, forget = ascent_and_descent(lesson)
    found = flat(controls.siss_without_sampling(lesson, STEP))
    torch.testing.assert_close(found, retain - 0.1 * retain.norm() / forget.norm() * forget, rtol=2e-4, atol=1e-5)
    assert (found - retain).norm().item() == pytest.approx(0.1 * retain.norm().item(), rel=1e-3)


def test_esd_points_away_from_the_prompt_and_takes_only_targets_that_have_one(lesson: Lesson) -> None:
    with torch.no_grad():  # the student has moved away from the base model
        lesson.weights[0].add_(0.1)
    batch = lesson.targets(STEP, 10, torch.tensor([0, 1, 2]))
    assert (batch.conditioning["length"] > 0).all()
    nothing = {"length": torch.zeros(10)}
    with torch.no_grad(), lesson.frozen():
        bare = lesson.model.predict(batch.x_t, batch.time, nothing)
        named = lesson.model.predict(batch.x_t, batch.time, batch.conditioning)
    prediction = lesson.model.predict(batch.x_t, batch.time, batch.conditioning)
    wanted = gradient(lesson, (prediction - (2 * bare - named)).square().mean())
    assert_same(controls.esd(lesson, STEP), wanted)


def test_esd_refuses_targets_without_prompts(make_lesson: MakeLesson) -> None:
    lesson = make_lesson()
    lesson.forget.prompt.zero_()
    with pytest.raises(InputError, match="esd needs targets with prompts"):
        controls.esd(lesson, STEP)


@pytest.mark.parametrize("method", [controls.siss, controls.siss_without_sampling, controls.erase_diff])
def test_a_step_draws_the_same_again_and_another_step_other_samples(
    lesson: Lesson, method: Callable[[Lesson, int], Gradient]
) -> None:
    first, again, other = (flat(method(lesson, step)) for step in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.method])
def test_an_arm_costs_the_passes_it_says(make_lesson: MakeLesson, name: str) -> None:
    """One per sample forward, two back: counted on the network itself, the frozen one included."""
    arm, plain = ARMS[name], make_lesson()
    lesson = make_lesson(**arm.training(plain.training).model_dump())
    counted = []

    def forward(module: torch.nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        counted.append(len(output))
        if output.requires_grad:
            output.register_hook(lambda grad: counted.append(2 * len(grad)))

    lesson.model.network.register_forward_hook(forward)
    with lesson.frozen():
        lesson.model.network.register_forward_hook(forward)
    assert arm.method is not None
    arm.method(lesson, STEP)
    assert sum(counted) == arm.passes(lesson)


def test_dot_sums_over_all_tensors() -> None:
    assert dot([torch.ones(2), torch.tensor([3.0])], [torch.ones(2), torch.tensor([2.0])]) == 8
