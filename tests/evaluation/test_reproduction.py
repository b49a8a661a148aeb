"""Excess reproduction: what its bounds cover, what it calls memory, and what it says."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from expunge.evaluation.encoders import Encoder
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

LEVELS = (0.3, 0.5, 0.7)
NAMES = ("first", "second")
CONDITIONS = conditions_of([True, False], [0, 1], ["own prompt", "empty prompt"], most=2)
ABILITY, SPREAD, NOISE = 0.33, 0.12, 0.1
"""Of pictures that were never seen, as on the testbeds: mean, deviation between pictures, and between draws."""
DRAWS = 9
BY_LEVEL = torch.tensor([0.1, 0.0, -0.1], dtype=torch.float64)
"""How far a level's similarities lie from the mean of all three."""


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def unseen_like(generator: torch.Generator, pictures: int = 24) -> Unseen:
    """M pictures by two encoders that mostly agree."""
    shared, own = normal(pictures, 1, generator=generator), normal(pictures, 2, generator=generator)
    noise = normal(pictures, 2, generator=generator) * NOISE / math.sqrt(DRAWS)
    return Unseen(ABILITY + SPREAD * (0.8 * shared + 0.6 * own) + noise, LEVELS)


def draws_around(means: Tensor, n: int, generator: torch.Generator, noise: float = NOISE) -> Tensor:
    """[C, n, E] around `means` [C, E], at levels that differ."""
    levels = BY_LEVEL[torch.arange(n) % 3][:, None]
    return means[:, None] + levels + noise * normal(len(means), n, means.shape[1], generator=generator)


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
