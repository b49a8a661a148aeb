"""Rejecting and retrying: which of the pictures that an editor makes becomes the surrogate."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from expunge.errors import InputError
from expunge.families import load_model
from expunge.settings import ModelSettings
from expunge.surrogates import ATTEMPTS, Judge, Painter, Studio, Task, Verdict

GOOD = Verdict(likeness=-0.1, plausible=True, matches=False)
NEAR = Verdict(likeness=0.2, plausible=True, matches=False)
NEARER = Verdict(likeness=0.3, plausible=True, matches=False)
STRANGE = Verdict(likeness=-0.5, plausible=False, matches=False)
TARGET = Verdict(likeness=0.1, plausible=True, matches=True)


@dataclass
class Numbered:
    """Paints the number of the attempt."""

    asked: list[int] = field(default_factory=list)

    def __call__(self, task: Task) -> np.ndarray:
        self.asked.append(task.attempt)
        return np.full_like(task.target, task.attempt)


@dataclass(frozen=True)
class Scripted:
    """Says the same of attempt i of every target."""

    says: list[Verdict]

    def against(self, targets: np.ndarray) -> Judge:
        assert targets.shape == (2, 8, 8, 3), "all pictures of the request"
        return lambda surrogate: self.says[surrogate[0, 0, 0]]


def _made(says: list[Verdict] | None) -> tuple[list[int], list[int]]:
    """Return which attempt became the surrogate of each of two targets, and which were made."""
    painter = Painter(load_model(ModelSettings(source="testbed:faces"), (24, 24)), "", 1.0, 2)
    studio = Studio(np.zeros((1, 8, 8, 3), np.uint8), painter, None if says is None else Scripted(says))
    editor = Numbered()
    surrogates = studio.make(editor, [np.zeros((8, 8, 3), np.uint8)] * 2, mask=None, seed=0)
    return [int(surrogate[0, 0, 0]) for surrogate in surrogates], editor.asked


def test_the_first_good_one_is_taken() -> None:
    assert _made([NEAR, STRANGE, GOOD]) == ([2, 2], [0, 1, 2] * 2)


def test_without_a_judge_the_first_is_taken() -> None:
    assert _made(None) == ([0, 0], [0, 0])


@pytest.mark.parametrize(
    ("says", "best"),
    [
        ([NEARER, NEAR, NEARER], 1),
        ([STRANGE, NEARER, STRANGE], 1),
        ([TARGET, NEARER, TARGET], 1),
        ([TARGET, STRANGE, TARGET], 1),
    ],
)
def test_the_best_is_taken_where_none_is_good(says: list[Verdict], best: int) -> None:
    chosen, asked = _made([*says, *[says[0]] * (ATTEMPTS - len(says))])
    assert chosen == [best, best]
    assert len(asked) == 2 * ATTEMPTS


def test_a_request_whose_surrogates_are_all_the_target_is_refused() -> None:
    with pytest.raises(
        InputError, match=rf"edit: each of {ATTEMPTS} surrogates still shows the target: give surrogates"
    ):
        _made([TARGET] * ATTEMPTS)
