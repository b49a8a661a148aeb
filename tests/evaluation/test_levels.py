"""The levels that are chosen are those where the base model's memory shows."""

import math

import pytest
import torch
from torch import Tensor

from expunge.evaluation.levels import choose_levels
from expunge.evaluation.space import Space
from expunge.evaluation.subject import Subject
from tests.evaluation.domains import Pixels

GRID = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


SPACE = Space((Pixels(),), (torch.zeros(3 * 8 * 8),))


class Memory(Subject):
    """Returns any picture at low levels and none at high ones; what it knows it returns up to level `lasts`."""

    def __init__(self, known: Tensor, lasts: float) -> None:
        self.known, self.lasts = known, lasts

    def regenerate(self, pictures: Tensor, prompts: Tensor, level: float, seeds: Tensor) -> Tensor:
        error = torch.stack([self.noise(seed) for seed in seeds.tolist()])
        remembered = (pictures[:, None] - self.known[None]).abs().amax((2, 3, 4)).amin(1) < 1e-6
        wrong = torch.where(remembered & (level <= self.lasts), 0.1, 4 * level)
        return pictures + wrong[:, None, None, None] * error

    def noise(self, seed: int) -> Tensor:
        return torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed))

    def generate(self, prompts: Tensor, seeds: Tensor) -> Tensor:
        raise NotImplementedError


def pictures(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


KNOWN, UNSEEN = pictures(8, seed=1), pictures(24, seed=2)


@pytest.mark.parametrize("lasts", [0.5, 0.6, 0.8])
def test_memory_stands_out_most_where_it_lasts_and_ability_does_not(lasts: float) -> None:
    levels = choose_levels(Memory(KNOWN, lasts), SPACE, KNOWN, UNSEEN, 0, GRID)
    assert len(levels) == 3
    assert max(levels) <= lasts
    assert min(levels) >= 0.3
    assert levels == tuple(sorted(levels))


def test_the_levels_are_neighbours_though_one_beyond_a_gap_stands_out() -> None:
    """At 0.8 hardly anything comes back, so that what little does lies many deviations above the rest."""
    known = Memory(KNOWN, 0.5)
    assert choose_levels(known, SPACE, KNOWN, UNSEEN, 0, (0.8, *GRID[:-1])) == (0.3, 0.4, 0.5)


def test_few_known_pictures_are_not_hidden_by_many_that_the_model_does_not_know() -> None:
    mixed = torch.cat([KNOWN[:1], pictures(15, seed=3)])
    assert choose_levels(Memory(KNOWN, 0.6), SPACE, mixed, UNSEEN, 0, GRID) == (0.4, 0.5, 0.6)


def test_levels_without_memory_are_left_out() -> None:
    known = pictures(1, seed=1)
    assert choose_levels(Memory(known, 0.2), SPACE, known, UNSEEN, 0, (0.2, 0.7, 0.8)) == (0.2,)


class Flat(Memory):
    """Returns every picture equally well, or badly."""

    def regenerate(self, pictures: Tensor, prompts: Tensor, level: float, seeds: Tensor) -> Tensor:
        return pictures * self.lasts


@pytest.mark.parametrize("scale", [1.0, math.nan])
def test_a_model_that_shows_no_memory_at_all_has_no_level(scale: float) -> None:
    assert choose_levels(Flat(KNOWN, scale), SPACE, KNOWN, UNSEEN, 0, GRID) == ()


def test_the_number_of_levels_is_the_callers_choice() -> None:
    assert len(choose_levels(Memory(KNOWN, 0.8), SPACE, KNOWN, UNSEEN, 0, GRID, count=2)) == 2
