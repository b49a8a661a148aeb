"""A surrogate that is still its target, or no picture of the model's domain, is rejected and made again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from expunge.errors import InputError
from expunge.surrogates._painter import Painter
from expunge.surrogates.base import Editor, Task

ATTEMPTS = 20
"""Pictures that an editor makes of one target before the best of them has to do."""


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a surrogate."""

    likeness: float
    """How much more it is like the target than unrelated pictures are; up to 0 it is no longer the target."""
    plausible: bool
    matches: bool
    """Every encoder takes it for the target."""

    @property
    def good(self) -> bool:
        return self.likeness <= 0 and self.plausible


class Judge(Protocol):
    """Tells surrogates of one request's pictures from those pictures."""

    def __call__(self, surrogate: np.ndarray) -> Verdict:
        """Judge uint8 [h, w, 3]."""
        ...


class Judging(Protocol):
    """Makes a judge for each request."""

    def against(self, targets: np.ndarray) -> Judge:
        """targets: uint8 [T, h, w, 3], all pictures of the request: a surrogate of one must not be another either."""
        ...


@dataclass(frozen=True)
class Studio:
    """What the surrogates of a job are made with."""

    donors: np.ndarray
    """uint8 [M, h, w, 3]: pictures that an editor may use parts of."""
    painter: Painter
    judging: Judging | None = None
    """None takes the first picture that an editor makes."""

    def make(
        self, editor: Editor, targets: Sequence[np.ndarray], *, mask: np.ndarray | None, seed: int
    ) -> list[np.ndarray]:
        """Return a surrogate of each target of a request, uint8 [h, w, 3] each. Raises InputError where there is none.

        mask: bool [h, w], true where the targets may change; None means the editor's default.
        """
        judge = None if self.judging is None else self.judging.against(np.stack(targets))
        tasks = [Task(target, mask, self.donors, seed, painter=self.painter) for target in targets]
        return [_best(editor, task, judge) for task in tasks]


def _best(editor: Editor, task: Task, judge: Judge | None) -> np.ndarray:
    """Return the first good picture, or else the best of ATTEMPTS; without a judge, the first.

    The best is the one least like the target among those that are plausible, if any is. Raises InputError if every
    encoder takes even that one for the target: training towards it would leave the target where it is.
    """
    if judge is None:
        return editor(task)
    tried: list[tuple[Verdict, np.ndarray]] = []
    for attempt in range(ATTEMPTS):
        surrogate = editor(replace(task, attempt=attempt))
        verdict = judge(surrogate)
        if verdict.good:
            return surrogate
        tried.append((verdict, surrogate))
    verdict, best = min(tried, key=lambda each: (each[0].matches, not each[0].plausible, each[0].likeness))
    if verdict.matches:
        raise InputError(
            f"edit: each of {ATTEMPTS} surrogates still shows the target", hint="give surrogates, or another edit"
        )
    return best
