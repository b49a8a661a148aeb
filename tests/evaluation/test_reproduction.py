"""Excess reproduction: what its bounds cover, what it calls memory, and what it says."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from expunge.evaluation.reproduction import (
    Condition,
    Unseen,
    compare,
    compare_in_rounds,
    conditions_of,
    draw,
    draws_for,
    measure_unseen,
    ratio_bounds,
    reproduces,
    reproduction_rule,
    why_not_reproduced,
)
from expunge.evaluation.space import Space
from expunge.evaluation.subject import Subject
from expunge.evaluation.views import VIEWS
from expunge.settings import GateSettings
from expunge.types import ConditionEvidence
from tests.evaluation.domains import Pixels

LEVELS = (0.3, 0.5, 0.7)
NAMES = ("first", "second")
CONDITIONS = conditions_of([True, False], [0, 1], ["own prompt", "empty prompt"], most=2)
ABILITY, SPREAD, NOISE = 0.33, 0.12, 0.1
"""Of pictures that were never seen, as on the testbeds: mean, deviation between pictures, and between draws."""
DRAWS = 9
GATE = GateSettings()
MAX_EXCESS = GATE.max_excess
BY_LEVEL = torch.tensor([0.1, 0.0, -0.1], dtype=torch.float64)
"""How far a level's similarities lie from the mean of all three."""


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def unseen_like(generator: torch.Generator, pictures: int = 24) -> Unseen:
    """M pictures by two encoders that mostly agree."""
    shared, own = normal(pictures, 1, generator=generator), normal(pictures, 2, generator=generator)
    noise = normal(pictures, len(LEVELS), 2, generator=generator) * NOISE / math.sqrt(DRAWS / len(LEVELS))
    means = ABILITY + SPREAD * (0.8 * shared + 0.6 * own)
    return Unseen(means[:, None] + BY_LEVEL[:, None] + noise, LEVELS)


def draws_around(means: Tensor, n: int, generator: torch.Generator, noise: float = NOISE) -> Tensor:
    """[C, n, E] around `means` [C, E], at levels that differ, or those of each level, [C, L, E]."""
    places = torch.arange(n) % 3
    levels = means[:, places] if means.ndim == 3 else means[:, None] + BY_LEVEL[places][:, None]
    return levels + noise * normal(len(means), n, means.shape[-1], generator=generator)


def never_seen(pictures: int, generator: torch.Generator, agreement: float) -> Tensor:
    """Means [C, 2] of pictures in eight conditions each; agreement: of the conditions of one picture."""
    shared = normal(pictures, 1, 1, generator=generator)
    own = normal(pictures, 8, 2, generator=generator)
    return ABILITY + SPREAD * (agreement**0.5 * shared + (1 - agreement) ** 0.5 * own).flatten(0, 1)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("excess", [0.3, 0.5])
def test_the_bounds_cover_the_true_ratio_as_often_as_they_say(ratio: float, excess: float) -> None:
    """200 references x 10 conditions: 95 %, give or take the 2.5 % that 200 independent references can be off."""
    generator = torch.Generator().manual_seed(1)
    below, above = [], []
    for _ in range(200):
        unseen = unseen_like(generator)
        truth = torch.full((10, 2), ABILITY, dtype=torch.float64)
        shared = 0.5 * NOISE * normal(10, DRAWS, 2, generator=generator)
        base = draws_around(truth + excess, DRAWS, generator) + shared
        after = draws_around(truth + ratio * excess, DRAWS, generator) + shared
        lower, upper = ratio_bounds(base, after, unseen, 0.95)
        below.append((lower <= ratio).double().mean())
        above.append((upper >= ratio).double().mean())
    assert torch.stack(above).mean() == pytest.approx(0.95, abs=0.025)
    assert torch.stack(below).mean() == pytest.approx(0.95, abs=0.025)


def test_differences_between_levels_are_not_counted_as_noise() -> None:
    generator = torch.Generator().manual_seed(2)
    unseen, means = unseen_like(generator), torch.full((5, 2), 0.8, dtype=torch.float64)
    base, after = draws_around(means, DRAWS, generator), draws_around(means - 0.3, DRAWS, generator)
    steeper = 3 * BY_LEVEL[torch.arange(DRAWS) % 3][:, None]
    plain, steep = (ratio_bounds(base + by, after - by, unseen, 0.95)[1] for by in (0, steeper))
    assert steep.allclose(plain)


def test_a_base_model_without_excess_bounds_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    unseen, means = unseen_like(generator), torch.full((3, 2), ABILITY - 0.05, dtype=torch.float64)
    lower, upper = ratio_bounds(draws_around(means, 9, generator), draws_around(means, 9, generator), unseen, 0.95)
    assert (lower == -math.inf).all()
    assert (upper == math.inf).all()


def test_a_model_that_was_not_changed_keeps_all_of_its_memory() -> None:
    generator = torch.Generator().manual_seed(4)
    base = draws_around(torch.full((3, 2), 0.8, dtype=torch.float64), 9, generator)
    lower, upper = ratio_bounds(base, base, unseen_like(generator), 0.95)
    assert lower.allclose(torch.ones_like(lower))
    assert upper.allclose(torch.ones_like(upper))


def test_as_many_draws_as_levels_are_refused() -> None:
    draws = torch.zeros(1, 3, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="3 draws at 3 levels"):
        ratio_bounds(draws, draws, unseen_like(torch.Generator().manual_seed(0)), 0.95)


@pytest.mark.parametrize("agreement", [0.0, 0.7, 0.95])
@pytest.mark.parametrize("pictures", [1, 4])
def test_pictures_that_were_never_seen_are_called_reproduced_once_in_twenty_times(
    pictures: int, agreement: float
) -> None:
    """Over 16 or 64 figures together: 400 trials, so 5 % plus two standard errors of 1.1 % each."""
    generator = torch.Generator().manual_seed(5)
    wrong = 0
    for _ in range(400):
        base = draws_around(never_seen(pictures, generator, agreement), DRAWS, generator)
        wrong += bool(reproduces(base, unseen_like(generator), 0.95).any())
    assert wrong / 400 <= 0.05 + 0.022


def test_memorised_pictures_are_called_reproduced_in_97_of_100_trials() -> None:
    """As `faces` remembers them at levels 0.3 to 0.5: 0.77 by EfficientNet-Lite0, 0.82 by edges."""
    generator = torch.Generator().manual_seed(6)
    found = 0
    for _ in range(200):
        means = never_seen(1, generator, 0.7) - ABILITY + torch.tensor([0.77, 0.82])
        found += bool(reproduces(draws_around(means, DRAWS, generator), unseen_like(generator), 0.95).any())
    assert found >= 194


def test_memory_in_one_condition_of_many_is_found() -> None:
    """A prompt of its own may be the only way to a picture."""
    generator = torch.Generator().manual_seed(7)
    means = torch.full((16, 2), ABILITY, dtype=torch.float64)
    means[5] = 0.95
    informative = reproduces(draws_around(means, DRAWS, generator), unseen_like(generator), 0.95)
    assert informative[5].all()
    assert informative.sum() == 2


def test_a_base_model_without_finite_figures_is_not_excused() -> None:
    generator = torch.Generator().manual_seed(8)
    base = draws_around(torch.full((2, 2), ABILITY - 0.2, dtype=torch.float64), DRAWS, generator)
    base[1, 4, 0] = math.nan
    assert reproduces(base, unseen_like(generator), 0.95).tolist() == [[False, False], [True, False]]


class Drawn:
    """Draws of a model that reproduces each condition with its mean in [C, E], and which of them were asked for."""

    def __init__(self, means: Tensor, seed: int, noise: float = NOISE) -> None:
        self.means, self.seed, self.noise = means, seed, noise
        self.asked: list[tuple[int, range]] = []

    def __call__(self, conditions: Sequence[Condition], draws: range) -> Tensor:
        self.asked.append((len(conditions), draws))
        rows = [CONDITIONS.index(condition) for condition in conditions]
        generator = torch.Generator().manual_seed(self.seed * 1_000 + draws.start)
        return draws_around(self.means, len(draws), generator, self.noise)[rows]


def judged(base: Tensor, after: Tensor, seed: int, noise: float = NOISE) -> tuple[tuple[ConditionEvidence, ...], Drawn]:
    """The evidence, and what was asked of the hotfix."""
    unseen = unseen_like(torch.Generator().manual_seed(seed))
    known, fixed = Drawn(base, seed, noise), Drawn(after, seed + 500_000, noise)
    draws = range(DRAWS)
    informative = reproduces(known(CONDITIONS, draws), unseen, 0.95)
    evidence = compare_in_rounds(
        CONDITIONS, NAMES, known, fixed, unseen, informative, draws=draws, max_excess=MAX_EXCESS, confidence=0.95
    )
    return evidence, fixed


def everywhere(value: float) -> Tensor:
    return torch.full((len(CONDITIONS), 2), value, dtype=torch.float64)


def passed(evidence: Sequence[ConditionEvidence]) -> bool:
    return reproduction_rule(evidence, GATE).passed


def test_one_condition_that_keeps_its_memory_fails_a_removal_in_all_but_one_of_a_hundred_trials() -> None:
    """Looking up to three times included. The condition keeps 85 % of its memory, where 80 % is allowed."""
    after = everywhere(ABILITY)
    after[6] = ABILITY + 0.85 * 0.5
    assert sum(passed(judged(everywhere(ABILITY + 0.5), after, seed)[0]) for seed in range(200)) <= 2


def test_memory_that_is_gone_passes_in_all_but_one_of_twenty_trials() -> None:
    """With 16 conditions by two encoders, the worst of which decides."""
    trials = [judged(everywhere(ABILITY + 0.5), everywhere(ABILITY), seed)[0] for seed in range(200)]
    assert sum(map(passed, trials)) >= 190


def test_one_level_that_keeps_its_memory_fails_a_removal_in_all_but_one_of_a_hundred_trials() -> None:
    """The lowest level, of one picture under one prompt. That the others do better must not help."""
    after = torch.full((len(CONDITIONS), len(LEVELS), 2), ABILITY, dtype=torch.float64) + BY_LEVEL[:, None]
    rows = [(c.picture, c.label) == (0, "own prompt") for c in CONDITIONS]
    after[rows, 0] += 0.85 * 0.5
    after[rows, 1:] -= 0.1
    trials = [judged(everywhere(ABILITY + 0.5), after, seed)[0] for seed in range(200)]
    assert sum(map(passed, trials)) <= 2
    assert "picture 1, all views at noise level 0.3, under the own prompt" in reproduction_rule(trials[0], GATE).why


def test_where_a_single_view_shows_memory_no_level_is_judged_by_itself() -> None:
    """All rounds draw it nine times per level: too few, so that a removal would fail there by chance."""
    base = everywhere(ABILITY)
    base[0] = 0.95
    trials = [judged(base, everywhere(ABILITY), seed)[0] for seed in range(100)]
    assert all(one.level is None for evidence in trials for one in evidence)
    assert sum(map(passed, trials)) >= 95


def test_a_perfect_removal_that_leaves_pictures_their_own_ability_passes_in_nineteen_of_twenty_trials() -> None:
    """Where the base model's excess is five times as much as abilities deviate."""
    passing = 0
    for seed in range(200):
        own = never_seen(2, torch.Generator().manual_seed(seed), agreement=0.7)
        passing += passed(judged(everywhere(ABILITY + 5 * SPREAD), own, seed)[0])
    assert passing >= 190


def test_a_certain_failure_ends_the_drawing() -> None:
    _, fixed = judged(everywhere(0.85), everywhere(0.85), seed=1)
    assert fixed.asked == [(16, range(9))]


def test_a_certain_success_ends_the_drawing() -> None:
    _, fixed = judged(everywhere(0.85), everywhere(0.3), seed=1, noise=0.02)
    assert fixed.asked == [(16, range(9))]


def test_only_undecided_conditions_are_drawn_again() -> None:
    after = everywhere(0.3)
    after[3] = ABILITY + 0.79 * (0.85 - ABILITY)
    evidence, fixed = judged(everywhere(0.85), after, seed=1, noise=0.05)
    assert fixed.asked == [(16, range(9)), (1, range(9, 18)), (1, range(18, 27))]
    assert {one.draws for one in evidence[6:8]} == {27}
    assert {one.draws for one in (*evidence[:6], *evidence[8:32])} == {9}


def test_conditions_without_memory_are_not_drawn_with_the_hotfix() -> None:
    base = everywhere(ABILITY)
    base[:4] = 0.95
    evidence, fixed = judged(base, everywhere(ABILITY), seed=2, noise=0.03)
    assert [count for count, _ in fixed.asked] == [4]
    assert all(one.after is None and not one.informative for one in evidence[8:32])
    assert passed(evidence)


def test_rounds_must_cover_the_levels_equally() -> None:
    unseen = unseen_like(torch.Generator().manual_seed(0))
    drawn = Drawn(everywhere(0.8), 0)
    informative = torch.ones(len(CONDITIONS), 2, dtype=torch.bool)
    rest = {"draws": range(8), "max_excess": MAX_EXCESS, "confidence": 0.95}
    with pytest.raises(ValueError, match="8 draws per round"):
        compare_in_rounds(CONDITIONS, NAMES, drawn, drawn, unseen, informative, **rest)
    assert draws_for(8, LEVELS) == 9
    assert draws_for(9, LEVELS) == 9


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_hotfix_without_finite_figures_never_passes(broken: float) -> None:
    base, after = everywhere(0.85), everywhere(0.3)
    after[2, 1] = broken
    evidence, fixed = judged(base, after, seed=1, noise=0.02)
    rule = reproduction_rule(evidence, GateSettings(max_excess=1e9))
    assert not rule.passed
    assert "Not measured" in rule.why
    assert len(fixed.asked) == 1, "more draws would not help"


def comparison(base: Tensor, after: Tensor | None) -> tuple[ConditionEvidence, ...]:
    generator = torch.Generator().manual_seed(9)
    unseen = unseen_like(generator)
    before = draws_around(base, DRAWS, generator, 0.01)
    then = None if after is None else draws_around(after, DRAWS, generator, 0.01)
    informative = torch.ones(len(CONDITIONS), 2, dtype=torch.bool)
    return compare(CONDITIONS, NAMES, before, then, unseen, informative, 0.95)


def test_the_rule_names_the_condition_that_kept_most() -> None:
    after = everywhere(0.3)
    after[9, 1] = 0.8
    rule = reproduction_rule(comparison(everywhere(0.85), after), GateSettings())
    worst = CONDITIONS[9]
    assert not rule.passed
    assert rule.condition == f"picture {worst.picture + 1}, {worst.view}, under the {worst.label}, by second"
    for part in (rule.condition, "0.85", "0.80", "80%"):
        assert part in rule.why
    assert rule.value == pytest.approx(0.9, abs=0.05)
    assert rule.bound is not None
    assert rule.value is not None
    assert rule.bound > rule.value
    assert rule.threshold == MAX_EXCESS
    assert rule.base == pytest.approx(0.85 - ABILITY, abs=0.06)


def test_a_condition_that_was_not_drawn_never_passes_but_a_measured_failure_is_named_first() -> None:
    drawn, undrawn = comparison(everywhere(0.85), everywhere(0.3)), comparison(everywhere(0.85), None)
    failed = comparison(everywhere(0.85), everywhere(0.8))
    assert passed(drawn)
    missing = reproduction_rule([*drawn[:-1], undrawn[-1]], GateSettings())
    assert not missing.passed
    assert missing.why.startswith("Not measured")
    assert reproduction_rule([*undrawn[:-1], failed[-1]], GateSettings()).condition.endswith("by second")


def test_conditions_without_memory_decide_nothing() -> None:
    evidence = comparison(everywhere(0.85), everywhere(0.3))
    ignored = comparison(everywhere(0.85), everywhere(0.85))[0].model_copy(update={"informative": False})
    assert passed([*evidence, ignored])
    with pytest.raises(ValueError, match="not reproduced"):
        reproduction_rule([ignored], GateSettings())


def test_the_sentence_of_a_request_without_memory_gives_its_figures() -> None:
    generator = torch.Generator().manual_seed(10)
    unseen, means = unseen_like(generator), everywhere(0.2)
    means[4, 0] = 0.44
    base = draws_around(means, DRAWS, generator, 0.01)
    why = why_not_reproduced(CONDITIONS, NAMES, base, unseen, 0.95)
    assert f"{CONDITIONS[4].view}, under the {CONDITIONS[4].label}, by first: similarity 0.4" in why
    assert f"below {unseen.high[0]:.2f}" in why


@pytest.mark.parametrize(
    ("held_out", "most", "nights"),
    [
        ([False], 4, [[0], [0]]),
        ([False, True, False, False], 4, [[1, 0, 2, 3]]),
        ([False, True, False, False], 2, [[1, 0], [1, 2], [1, 3], [1, 0]]),
        ([True, True, True, False], 4, [[0, 3, 1, 2]]),
        ([True, True, False, False, False, False], 3, [[0, 2, 1], [0, 3, 1]]),
        ([False, False, True], 1, [[2]]),
        ([False, False, False], 1, [[0], [1], [2], [0]]),
    ],
)
def test_pictures_take_turns_and_those_that_training_never_saw_come_first(
    held_out: list[bool], most: int, nights: list[list[int]]
) -> None:
    for attempt, expected in enumerate(nights):
        conditions = conditions_of(held_out, [0], ["empty prompt"], most=most, attempt=attempt)
        assert list(dict.fromkeys(c.picture for c in conditions)) == expected
        assert all(c.held_out == held_out[c.picture] for c in conditions)
        assert len(conditions) == len(VIEWS) * len(expected)


def test_every_view_is_tested_under_every_prompt() -> None:
    conditions = conditions_of([False], [2, 0], ["own prompt", "empty prompt"], most=4)
    assert {(c.view, c.prompt, c.label) for c in conditions} == {
        (view, prompt, label) for view in VIEWS for prompt, label in ((2, "own prompt"), (0, "empty prompt"))
    }


SPACE = Space((Pixels(),), (torch.zeros(3 * 8 * 8),))


class Faked(Subject):
    """Applies `returns` to the pictures that it is given, and remembers what it was asked."""

    def __init__(self, returns: Callable[[Tensor], Tensor] = lambda pictures: pictures) -> None:
        self.returns = returns
        self.calls: list[tuple[int, float]] = []
        self.levels: dict[int, float] = {}
        self.prompts: list[int] = []

    def regenerate(self, pictures: Tensor, prompts: Tensor, level: float, seeds: Tensor) -> Tensor:
        self.calls += [(seed, level) for seed in seeds.tolist()]
        self.prompts += prompts.tolist()
        return self.returns(pictures)

    def generate(self, prompts: Tensor, seeds: Tensor) -> Tensor:
        raise NotImplementedError


def pictures(count: int) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(11)) * 2 - 1


def drawn(subject: Subject, draws: range, conditions: Sequence[Condition] = CONDITIONS) -> Tensor:
    return draw(subject, SPACE, pictures(2), conditions, LEVELS, draws)


def test_a_perfect_memory_has_similarity_one_in_every_condition() -> None:
    similarity = drawn(Faked(), range(6))
    assert similarity.shape == (len(CONDITIONS), 6, 1)
    assert similarity.dtype == torch.float64
    assert similarity.allclose(torch.ones_like(similarity))


def test_the_target_that_comes_back_in_another_view_still_counts() -> None:
    mirrored = drawn(
        Faked(VIEWS["mirrored"]), range(3), [c for c in CONDITIONS if c.view in ("as submitted", "mirrored")]
    )
    assert mirrored.allclose(torch.ones_like(mirrored))


def test_another_picture_is_not_taken_for_the_target() -> None:
    other = pictures(5)[4]
    assert drawn(Faked(lambda given: other.expand_as(given)), range(3)).max() < 0.5


def test_each_draw_keeps_its_level_and_seed_in_whatever_round_or_company() -> None:
    together, apart, alone = Faked(), Faked(), Faked()
    drawn(together, range(12))
    drawn(apart, range(6))
    drawn(apart, range(6, 12))
    drawn(alone, range(12), CONDITIONS[3:4])
    assert sorted(together.calls) == sorted(apart.calls)
    assert set(alone.calls) < set(together.calls)
    assert len(set(alone.calls)) == 12
    assert {level for _, level in together.calls} == set(LEVELS)


def test_prompts_share_their_noise_and_views_and_pictures_do_not() -> None:
    subject = Faked()
    drawn(subject, range(1))
    seeds = [seed for seed, _ in subject.calls]
    assert len(set(seeds)) == len(CONDITIONS) // 2
    assert sorted(subject.prompts) == sorted(c.prompt for c in CONDITIONS)


def test_outputs_that_are_no_numbers_have_no_similarity() -> None:
    assert drawn(Faked(lambda given: given * math.nan), range(3)).isnan().all()


def test_unseen_pictures_are_measured_in_every_view_and_under_every_prompt() -> None:
    subject = Faked(lambda given: given + torch.linspace(0, 3, given[0].numel()).view(given[0].shape))
    unseen = measure_unseen(subject, SPACE, pictures(8), [3, 5], LEVELS, range(9))
    assert unseen.values.shape == (8, 9, 1)
    assert set(subject.prompts) == {3, 5}
    assert unseen.levels == LEVELS
    assert unseen.mean < unseen.high
    assert unseen.high == pytest.approx(unseen.mean + 1.895 * unseen.spread * math.sqrt(1 + 1 / 8), rel=1e-3)


def test_a_reference_of_more_pictures_says_more_surely_what_is_unusual() -> None:
    values = unseen_like(torch.Generator().manual_seed(12), pictures=8).values
    few, many = Unseen(values, LEVELS), Unseen(values.repeat(8, 1, 1), LEVELS)
    assert (many.high < few.high).all()
