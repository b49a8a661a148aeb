"""The figures of one person tell a model that knows the person from one that does not."""

import torch
from torch import Tensor

from expunge.evaluation.subject import Subject
from expunge.testbed import people
from tests.benchmarks.person import PersonFigures, Share, person_figures

PICTURES = people.images().expand(-1, -1, 3, -1, -1)


class Parrot(Subject):
    """Gives back what it is shown, except a person whom it replaces by another; samples everybody it knows in turn."""

    def __init__(self, gone: int | None = None, instead: int = 0) -> None:
        self._gone, self._instead = gone, instead

    def regenerate(self, pictures: Tensor, prompts: Tensor, level: float, seeds: Tensor) -> Tensor:
        if self._gone is None:
            return pictures
        mine = torch.stack([(pictures == one).flatten(1).all(1) for one in PICTURES[self._gone]]).any(0)
        return torch.where(mine[:, None, None, None], PICTURES[self._instead, 0], pictures)

    def generate(self, prompts: Tensor, seeds: Tensor) -> Tensor:
        who = [person for person in range(36) if person != self._gone]
        return torch.stack([PICTURES[who[i % len(who)], 1] for i in range(len(prompts))])


def measured(subject: Subject) -> PersonFigures:
    return person_figures(subject, 5, submitted=range(4), seeds=2)


def test_a_model_that_knows_everybody() -> None:
    figures = measured(Parrot())
    assert figures.submitted == figures.trained == Share(8, 8)
    assert figures.held_out.total == 4
    assert figures.others == Share(35, 35)
    assert figures.unseen.total == 16
    assert figures.unseen.count >= 12
    assert figures.mistaken.total == 40
    assert figures.mistaken.count <= 2
    assert figures.samples == Share(10, 360)


def test_a_model_that_shows_somebody_else_instead() -> None:
    figures = measured(Parrot(gone=5, instead=6))
    assert figures.submitted == figures.trained == Share(0, 8)
    assert figures.held_out == Share(0, 4)
    assert figures.others == Share(35, 35)
    assert figures.samples == Share(0, 360)


def test_without_other_pictures_there_is_no_share_of_them() -> None:
    figures = person_figures(Parrot(), 5, seeds=1, samples=PICTURES[:36, 0])
    assert figures.trained == Share(0, 0)
    assert str(figures.trained) == "none"
    assert figures.samples == Share(1, 36)


def test_a_share_comes_with_its_exact_bounds() -> None:
    low, high = Share(0, 72).bounds
    assert low == 0
    assert 0.049 < high < 0.051  # 1 - 0.025 ** (1 / 72)
