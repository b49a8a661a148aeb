"""What survives, and what is left of the model that was attacked: on a UNet of 8x8 pixels, and on the shipped flags."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from expunge.evaluation import robustness
from expunge.evaluation.robustness import (
    Amount,
    Known,
    Lab,
    Memory,
    after_fine_tuning,
    after_relearning,
    after_rounding,
    after_search,
    at_other_scales,
    examine,
    not_tested,
    robustness_rule,
    search_latent,
)
from expunge.evaluation.space import Space
from expunge.evaluation.subject import ModelSubject, Subject
from expunge.evaluation.weights import State, mixed, restored, rounded, state_of
from expunge.families import load_model
from expunge.families.base import DiffusionModel
from expunge.preparation.dataset import RetainSet
from expunge.settings import ModelSettings, Settings
from tests.evaluation.domains import StandIn
from tests.families import tiny

REQUEST = "request-1"


class Pixels(StandIn):
    """Sees nothing but pixels."""

    usage = name = "pixels"

    def __call__(self, images: Tensor) -> Tensor:
        return images.mean(1).flatten(1)


SPACE = Space((Pixels(),), (torch.zeros(64),))


def picture(seed: int) -> Tensor:
    """Blocks of grey, as [3, 8, 8]."""
    blocks = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(seed)).round() * 1.6 - 0.8
    return torch.nn.functional.interpolate(blocks, size=8)[0].expand(3, -1, -1)


def known(request: str, seed: int) -> Known:
    one = picture(seed)
    return Known(request, one, (one * 0.95).expand(2, -1, -1, -1), 0)


TARGET, SURROGATE, CONTROL = known(REQUEST, 1), known("", 2), known("", 3)


def learn(model: DiffusionModel, pictures: Tensor, steps: int) -> None:
    """Train on pictures [N, 3, 8, 8], by plain means."""
    clean = model.encode(pictures).repeat(16 // len(pictures), 1, 1, 1)
    optimizer = torch.optim.Adam(model.network.requires_grad_().parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        time = model.time_from_uniform(torch.rand(len(clean), generator=generator))
        noise = torch.randn(clean.shape, generator=generator)
        a, b = (v.view(-1, 1, 1, 1) for v in (model.at(time).a, model.at(time).b))
        loss = (model.predict(a * clean + b * noise, time, {}) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.network.requires_grad_(False)


def laboratory(
    model: DiffusionModel,
    judge: Callable[[Subject], dict[str, float]],
    *,
    unrelated: RetainSet | None = None,
    learning_rate: float = 3e-3,
) -> Lab:
    table = model.condition(["", "a flag"])
    unrelated = unrelated or RetainSet(torch.zeros(4, *model.latent_shape), torch.zeros(4, dtype=torch.long))
    subject = ModelSubject(model, table, model.condition([""]), guidance=1.0, steps=4)
    return Lab(subject, judge, {REQUEST: 0.3}, 0.6, unrelated, learning_rate)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FINE_TUNE_STEPS": (3, 5), "SEARCH_STARTS": 2, "SEARCH_ITERATIONS": 4}.items():
        monkeypatch.setattr(robustness, name, value)


def ignore(subject: Subject) -> dict[str, float]:
    return {REQUEST: 0.0}


def same(model: DiffusionModel, state: State) -> bool:
    now = model.network.state_dict()
    return list(now) == list(state) and all(torch.equal(now[name], state[name]) for name in now)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> DiffusionModel:
    """A model that knows the target."""
    folder = tiny.ddpm(tmp_path_factory.mktemp("model"), beta_end=0.2)
    model = load_model(ModelSettings(source=str(folder)), (8, 8))
    learn(model, TARGET.picture[None], 100)
    return model


@pytest.fixture
def ddpm(learned: DiffusionModel) -> Iterator[DiffusionModel]:
    """The same for one test."""
    with restored(learned.network):
        yield learned


@pytest.fixture(scope="module")
def flags() -> DiffusionModel:
    return load_model(Settings.model_fields["models"].get_default(call_default_factory=True)["flags"], (32, 48))


@pytest.fixture(params=["ddpm", "flags"])
def model(request: pytest.FixtureRequest) -> DiffusionModel:
    """Trained in full, and by an adapter."""
    return request.getfixturevalue(request.param)


def shifted(base: State, by: float) -> State:
    return {name: tensor + by if tensor.is_floating_point() else tensor for name, tensor in base.items()}


ATTACKS: dict[str, Callable[[Lab, State], object]] = {
    "rounding": lambda lab, base: after_rounding(lab),
    "scales": lambda lab, base: at_other_scales(lab, shifted(base, 0.01)),
    "fine-tuning": lambda lab, base: after_fine_tuning(lab, (1, 2)),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("fails", [False, True])
def test_an_attack_changes_the_model_and_leaves_the_hotfix_bit_for_bit(
    model: DiffusionModel, attack: str, fails: bool
) -> None:
    before, changed = state_of(model.network), []

    def judge(subject: Subject) -> dict[str, float]:
        changed.append(not same(model, before))
        if fails:
            raise RuntimeError("the judge gave up")
        return {}

    expected = pytest.raises(RuntimeError, match="gave up") if fails else nullcontext()
    with expected:
        ATTACKS[attack](laboratory(model, judge), before)
    assert changed
    assert all(changed)
    assert same(model, before)
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert all(parameter.grad is None for parameter in model.network.parameters())


def test_int8_leaves_255_levels_per_channel_and_spares_biases(ddpm: DiffusionModel) -> None:
    before = state_of(ddpm.network)
    with rounded(ddpm.network, "int8"):
        weight, bias = (ddpm.network.state_dict()[f"conv_in.{part}"].clone() for part in ("weight", "bias"))
    assert torch.equal(bias, before["conv_in.bias"])
    for row, exact in zip(weight, before["conv_in.weight"], strict=True):
        levels = row / exact.abs().max() * 127
        torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
        assert (row - exact).abs().max() <= exact.abs().max() / 253


def test_bf16_leaves_8_bits_of_every_weight(ddpm: DiffusionModel) -> None:
    before = state_of(ddpm.network)
    with rounded(ddpm.network, "bf16"):
        after = state_of(ddpm.network)
    assert all(torch.equal(after[name], before[name].bfloat16().float()) for name in before)


@pytest.mark.parametrize(("change", "survives"), [(1e-4, False), (0.3, True)])
def test_a_removal_too_fine_for_int8_fails_its_request(ddpm: DiffusionModel, change: float, survives: bool) -> None:
    """The judge says whether the changed weight is still different from what the base model's is, as rounded."""
    weight = ddpm.network.get_parameter("conv_out.weight")
    with rounded(ddpm.network, "int8"):
        base = weight.clone()
    with torch.no_grad():
        # Not the largest of its channel, which decides the step.
        place = weight[0].abs().argmin()
        weight.view(-1)[place] += change * weight[0].abs().max()

    def judge(subject: Subject) -> dict[str, float]:
        return {REQUEST: 1.0 if torch.equal(weight, base) else 0.1}

    results = after_rounding(laboratory(ddpm, judge))
    assert {result.attack.split()[-1]: result.passed for result in results} == {"int8": survives, "bf16": True}
    rule = robustness_rule(results, REQUEST, 0.6)
    assert rule is not None
    assert rule.passed is survives
    if not survives:
        assert "int8" in rule.condition


def test_the_other_scales_lie_on_the_line_from_the_base_model(ddpm: DiffusionModel) -> None:
    base, seen = state_of(ddpm.network), []
    with torch.no_grad():
        ddpm.network.get_parameter("conv_out.bias").add_(1)

    def judge(subject: Subject) -> dict[str, float]:
        seen.append((ddpm.network.get_parameter("conv_out.bias") - base["conv_out.bias"]).item())
        return {REQUEST: 0.7}

    results = at_other_scales(laboratory(ddpm, judge), base)
    assert seen == pytest.approx([0.5, 0.8, 1.2], abs=1e-5)
    assert [(result.passed, result.decides) for result in results] == [(False, False)] * 3
    with mixed(ddpm.network, base, 0):
        assert same(ddpm, base)


def test_fine_tuning_learns_the_pictures_and_repeats_itself(ddpm: DiffusionModel) -> None:
    clean = ddpm.encode(CONTROL.picture[None])
    data = RetainSet(clean, torch.zeros(1, dtype=torch.long))

    def judge(subject: Subject) -> dict[str, float]:
        zero = torch.zeros(8, dtype=torch.long)
        made = subject.regenerate(CONTROL.picture.expand(8, -1, -1, -1), zero, 0.6, torch.arange(8))
        return {REQUEST: (made - CONTROL.picture).square().mean().item()}

    lab = laboratory(ddpm, judge, unrelated=data)
    before = judge(lab.subject)[REQUEST]
    first, again = after_fine_tuning(lab, (5, 30)), after_fine_tuning(lab, (5, 30))
    assert first == again
    assert [result.attack.split()[0] for result in first] == ["5", "30"]
    assert first[1].value is not None
    assert first[1].value < 0.7 * before


def memory(base: State, **changes: object) -> Memory:
    return replace(Memory(base, SPACE, (0.5, 0.7), [TARGET], [CONTROL]), **changes)


def test_a_target_that_is_hidden_but_not_removed_comes_back_sooner_than_an_unknown_picture_is_learned(
    ddpm: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robustness, "RELEARN_STEPS", (1, 2, 4, 8, 16, 32, 64))
    base = state_of(ddpm.network)
    with torch.no_grad():
        ddpm.network.get_parameter("conv_out.bias").add_(0.6)  # all that was learned is still there
    hidden = state_of(ddpm.network)
    results = after_relearning(laboratory(ddpm, ignore, learning_rate=1e-3), memory(base))
    assert same(ddpm, hidden)
    assert len(results) == 2  # as many pictures as there are, at most
    assert all(not result.passed and result.value is not None for result in results)


def test_a_picture_that_the_base_model_does_not_know_cannot_be_relearned_or_searched_for(ddpm: DiffusionModel) -> None:
    base = state_of(ddpm.network)
    strangers = memory(base, known=[replace(CONTROL, request=REQUEST)])
    for attack in (after_relearning, after_search):
        for result in attack(laboratory(ddpm, ignore), strangers):
            assert result.value is None
            assert result.why.startswith("Not measured")


def test_a_search_reaches_with_an_unchanged_model_all_that_it_reaches_with_the_base(
    ddpm: DiffusionModel,
) -> None:
    base = state_of(ddpm.network)
    unchanged = after_search(laboratory(ddpm, ignore), memory(base))
    assert [result.value for result in unchanged] == [pytest.approx(1)]
    assert not unchanged[0].passed
    learn(ddpm, SURROGATE.picture[None], 50)
    replaced = after_search(laboratory(ddpm, ignore), memory(base))
    assert replaced[0].value is not None
    assert replaced[0].value < 1


def test_a_longer_search_comes_nearer(ddpm: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, reached = laboratory(ddpm, ignore), []
    for iterations in (0, 10):
        monkeypatch.setattr(robustness, "SEARCH_ITERATIONS", iterations)
        reached.append(search_latent(lab, memory(state_of(ddpm.network)), CONTROL).item())
    assert reached[1] > reached[0]


@pytest.mark.parametrize(
    ("amount", "attacks"),
    [("off", []), ("small", ["int8", "bf16", "3 steps of"])],
)
def test_a_night_runs_as_much_as_the_setting_says(ddpm: DiffusionModel, amount: Amount, attacks: list[str]) -> None:
    results = examine(laboratory(ddpm, ignore), amount)
    assert len(results) == len(attacks)
    assert all(words in result.attack for words, result in zip(attacks, results, strict=True))
    assert [result.decides for result in results] == [words.endswith(("int8", "bf16")) for words in attacks]


def test_everything_needs_the_base_model(ddpm: DiffusionModel) -> None:
    with pytest.raises(ValueError, match="base model"):
        examine(laboratory(ddpm, ignore), "full")


def test_a_bound_that_is_no_number_does_not_pass(ddpm: DiffusionModel) -> None:
    results = after_rounding(laboratory(ddpm, lambda _: {REQUEST: float("nan")}))
    assert not any(result.passed for result in results)
    rule = robustness_rule(results, REQUEST, 0.6)
    assert rule is not None
    assert not rule.passed


def test_what_only_warns_makes_no_rule(ddpm: DiffusionModel) -> None:
    results = after_fine_tuning(laboratory(ddpm, lambda _: {REQUEST: 2.0}), (1,))
    assert not results[0].passed
    assert robustness_rule(results, REQUEST, 0.6) is None


def test_less_testing_is_said_to_leave_more_untested() -> None:
    assert [len(not_tested(amount)) for amount in ("off", "small", "full")] == [4, 4, 1]
    assert "int8" in not_tested("off")[0]
    assert not any("int8" in words for words in not_tested("small"))
