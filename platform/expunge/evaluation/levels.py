"""Choose the noise levels at which a model's memory shows.

From little noise any model returns any picture, and from much noise hardly any; where memory shows in between depends
on the model, its resolution and its noise path.
"""

from collections.abc import Sequence

from torch import Tensor

from expunge.evaluation.reproduction import Condition, Unseen, draw
from expunge.evaluation.space import Space
from expunge.evaluation.subject import Subject
from expunge.evaluation.views import VIEWS

DRAWS = 2
"""Per picture and level."""
LEAST = 0.25
"""A level must show this share of what the best one shows: less is likely to be luck, and would dilute the others."""
FIRST_DRAW = 100_000
"""Far from the draws that a verdict rests on: levels that were chosen for their luck in them would flatter it."""


def choose_levels(
    subject: Subject,
    space: Space,
    known: Tensor,
    unseen: Tensor,
    prompt_row: int,
    grid: Sequence[float],
    count: int = 3,
) -> tuple[float, ...]:
    """Return the `count` levels of `grid`, ascending, at which the base model's memory of `known` stands out most.

    known: float32 [N, 3, h, w], pictures that the model may have memorised. unseen: float32 [M, 3, h, w], pictures that
    it never saw. prompt_row: row of the conditioning; that of the empty prompt names none of them.

    What counts at a level is how far each known picture lies above 95 % of unseen ones, in standard deviations of
    those, averaged over pictures and encoders: the pictures that the model does not know cannot hide those that it
    does. Levels that show much less than the best are left out, so there may be fewer than `count`; where no picture
    lies above at any level, there are none. Whether a request is reproduced is for `reproduces` to say.
    """

    def values(pictures: Tensor) -> Tensor:
        """Mean similarity, float64 [N, G, E]."""
        conditions = [Condition(i, False, next(iter(VIEWS)), prompt_row, "") for i in range(len(pictures))]
        draws = range(FIRST_DRAW * len(grid), (FIRST_DRAW + DRAWS) * len(grid))  # begins with the grid's first level
        return draw(subject, space, pictures, conditions, grid, draws).unflatten(1, (DRAWS, len(grid))).mean(1)

    of_known, reference = values(known), Unseen(values(unseen), tuple(grid))
    merits = []
    for i in range(len(grid)):
        at = reference.at(i)
        above = (of_known[:, i] - at.high).clamp(min=0) / at.spread.clamp(min=1e-6)
        merits.append(above.mean().nan_to_num(0.0).item())
    best = sorted(range(len(grid)), key=lambda i: -merits[i])[:count]
    return tuple(sorted(grid[i] for i in best if merits[i] > 0 and merits[i] >= LEAST * merits[best[0]]))
