"""The two losses: where they vanish, which weights they move, and what they ask the frozen model."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from expunge.families.base import Conditioning, DiffusionModel
from expunge.preparation.dataset import ForgetSet, RetainSet
from expunge.settings import MethodSettings
from expunge.unlearning.losses import Losses
from expunge.unlearning.sampling import Draw
from expunge.unlearning.weighting import WEIGHTINGS

ROWS, PICKED = 5, [3, 0, 4]


@pytest.fixture
def forget() -> ForgetSet:
    x_f, x_s = _randn(1, 2, ROWS)
    return ForgetSet(x_f, x_s, torch.tensor([0, 1, 0, 1, 1]), torch.zeros(ROWS, dtype=torch.long))


@pytest.fixture
def retain() -> RetainSet:
    return RetainSet(_randn(2, ROWS), torch.tensor([0, 1, 0, 1, 1]))


@pytest.fixture
def drawn() -> Draw:
    return Draw(torch.tensor(PICKED), torch.tensor([0.1, 0.5, 0.9]), _randn(3, len(PICKED)))


def _randn(seed: int, *sizes: int) -> Tensor:
    return torch.randn(*sizes, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


def losses(model: DiffusionModel, **training: object) -> Losses:
    settings = {"forget_target": "surrogate", "weighting": "min_snr", "retain_target": "distill", **training}
    return Losses(model, nullcontext, MethodSettings.model_validate(settings), model.condition(["", "a prompt"]))


def last(model: DiffusionModel) -> nn.Conv2d:
    layer = model.network.get_submodule("2")
    assert isinstance(layer, nn.Conv2d)
    return layer


def noised(model: DiffusionModel, x: Tensor, draw: Draw) -> Tensor:
    at = model.at(draw.time)
    return at.a.view(-1, 1, 1, 1) * x + at.b.view(-1, 1, 1, 1) * draw.noise


def answering(model: DiffusionModel, clean: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[Conditioning]:
    """Make the model predict `clean` from any x_t; return the conditionings that it is called with."""
    asked: list[Conditioning] = []

    def predict(x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        asked.append(conditioning)
        at = model.at(time)
        a, b, alpha, beta = (v.view(-1, 1, 1, 1) for v in (at.a, at.b, at.alpha, at.beta))
        return alpha * (x_t - a * clean) / b + beta * clean

    monkeypatch.setattr(model, "predict", predict)
    return asked


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_forget_vanishes_at_the_corrected_target(
    toy: DiffusionModel, forget: ForgetSet, drawn: Draw, weighting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = losses(toy, weighting=weighting)
    answering(toy, forget.x_s[PICKED], monkeypatch)
    assert ask.forget(forget, drawn).item() == pytest.approx(0, abs=1e-8)
    answering(toy, forget.x_f[PICKED], monkeypatch)
    assert ask.forget(forget, drawn).item() > 0.1


def test_forget_is_the_weighted_error(toy: DiffusionModel, forget: ForgetSet, drawn: Draw) -> None:
    ask, at = losses(toy), toy.at(drawn.time)
    x_t = noised(toy, forget.x_f[PICKED], drawn)
    prompt = toy.condition(["", "a prompt"])["length"][forget.prompt[PICKED]]
    prediction = toy.predict(x_t, drawn.time, {"length": prompt})
    a, b, alpha, beta = (v.view(-1, 1, 1, 1) for v in (at.a, at.b, at.alpha, at.beta))
    x_s = forget.x_s[PICKED]
    target = alpha * (x_t - a * x_s) / b + beta * x_s
    weight = WEIGHTINGS["min_snr"](at, MethodSettings())
    expected = (weight * (prediction - target).square().mean((1, 2, 3))).mean()
    torch.testing.assert_close(ask.forget(forget, drawn), expected, rtol=1e-4, atol=1e-6)


def test_each_row_keeps_its_prompt(
    toy: DiffusionModel, forget: ForgetSet, retain: RetainSet, drawn: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = losses(toy)
    asked = answering(toy, forget.x_s[PICKED], monkeypatch)
    ask.forget(forget, drawn)
    ask.retain(retain, drawn)
    assert [conditioning["length"].tolist() for conditioning in asked] == [[8.0, 0.0, 8.0]] * 3


def test_distillation_vanishes_before_training(toy: DiffusionModel, retain: RetainSet, drawn: Draw) -> None:
    loss = losses(toy).retain(retain, drawn)
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in toy.network.parameters())


def test_distillation_asks_the_frozen_model(toy: DiffusionModel, retain: RetainSet, drawn: Draw) -> None:
    bias = last(toy).bias
    assert bias is not None

    @contextmanager
    def frozen() -> Iterator[None]:
        kept = bias.detach().clone()
        with torch.no_grad():
            bias.add_(0.5)
        yield
        with torch.no_grad():
            bias.copy_(kept)

    def make() -> AbstractContextManager[None]:
        return frozen()

    ask = Losses(toy, make, MethodSettings(retain_target="distill"), toy.condition(["", "a prompt"]))
    loss = ask.retain(retain, drawn)
    assert loss.item() == pytest.approx(0.25, rel=1e-4)
    loss.backward()
    # Towards the frozen model, whose bias is higher.
    assert bias.grad is not None
    assert (bias.grad < 0).all()


def test_data_retain_is_the_ordinary_loss(
    toy: DiffusionModel, retain: RetainSet, drawn: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = losses(toy, retain_target="data")
    answering(toy, retain.x_0[PICKED], monkeypatch)
    assert ask.retain(retain, drawn).item() == pytest.approx(0, abs=1e-8)
    answering(toy, retain.x_0[PICKED] + 1, monkeypatch)
    assert ask.retain(retain, drawn).item() > 0.1


@pytest.mark.parametrize("target", ["surrogate", "recognition"])
def test_gradient_is_in_the_trainable_parameters_alone(
    toy: DiffusionModel, forget: ForgetSet, drawn: Draw, target: str
) -> None:
    losses(toy, forget_target=target).forget(forget, drawn).backward()
    frozen, trained = toy.network.get_submodule("0"), last(toy)
    assert all(p.grad is None for p in frozen.parameters())
    assert all(p.grad is not None and p.grad.any() for p in trained.parameters())


def test_recognition_goes_all_the_way_where_the_frozen_model_recognises(
    toy: DiffusionModel, forget: ForgetSet, drawn: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(toy, forget.x_f[PICKED], monkeypatch)
    recognised = losses(toy, forget_target="recognition").forget(forget, drawn)
    torch.testing.assert_close(recognised, losses(toy).forget(forget, drawn), rtol=1e-3, atol=1e-5)


def test_recognition_moves_nothing_where_it_does_not(
    toy: DiffusionModel, forget: ForgetSet, drawn: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate has nothing in common with the target: the student is asked for what the frozen model says."""
    x_f = forget.x_f[PICKED].flatten(1)
    centred = x_f - x_f.mean(1, keepdim=True)
    other = _randn(9, len(PICKED)).flatten(1)
    other = other - other.mean(1, keepdim=True)
    other -= (other * centred).sum(1, keepdim=True) / centred.square().sum(1, keepdim=True) * centred
    answering(toy, other.view(-1, 2, 4, 4), monkeypatch)
    assert losses(toy, forget_target="recognition").forget(forget, drawn).item() == pytest.approx(0, abs=1e-7)
    assert losses(toy).forget(forget, drawn).item() > 0.1


@pytest.mark.parametrize("reached", [-0.25, 0.0, 0.3, 1.0])
def test_progress_is_how_far_the_estimate_is_from_target_to_surrogate(
    toy: DiffusionModel, forget: ForgetSet, drawn: Draw, reached: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_f, way = forget.x_f[PICKED], (forget.x_s - forget.x_f)[PICKED]
    # What is across the way does not count.
    across = _randn(9, len(PICKED))
    shadow = (across * way).sum((1, 2, 3), keepdim=True) / way.square().sum((1, 2, 3), keepdim=True)
    answering(toy, x_f + reached * way + across - shadow * way, monkeypatch)
    progress = losses(toy).progress(forget, drawn)
    assert progress.dtype == torch.float64
    assert progress.tolist() == pytest.approx([reached] * len(PICKED), abs=1e-4)
