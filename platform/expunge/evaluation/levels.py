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
    """Return `count` neighbouring levels of `grid`, ascending, at which the base model's memory of `known` stands out.

    known: float32 [N, 3, h, w], pictures that the model may have memorised. unseen: float32 [M, 3, h, w], pictures that
    it never saw. prompt_row: row of the conditioning; that of the empty prompt names none of them.

    What counts at a level is how far the similarity of each known picture lies above that of 95 % of unseen ones,
    averaged over pictures and encoders: the pictures that the model does not know cannot hide those that it does. In
    standard deviations of the unseen ones high levels would win, because hardly anything comes back there, known or
    not. Levels that show much less than the best are left out, so there may be fewer than `count`; where no picture
    lies above at any level, there are none. Whether a request is reproduced is for `reproduces` to say.
    """
    grid = sorted(grid)

    def values(pictures: Tensor) -> Tensor:
        """Mean similarity, float64 [N, G, E]."""
        conditions = [Condition(i, False, next(iter(VIEWS)), prompt_row, "") for i in range(len(pictures))]
        draws = range(FIRST_DRAW * len(grid), (FIRST_DRAW + DRAWS) * len(grid))  # begins with the grid's first level
        return draw(subject, space, pictures, conditions, grid, draws).unflatten(1, (DRAWS, len(grid))).mean(1)

    of_known, reference = values(known), Unseen(values(unseen), tuple(grid))
    merits = []
    for i in range(len(grid)):
        at = reference.at(i)
        merits.append((of_known[:, i] - at.high).clamp(min=0).mean().nan_to_num(0.0).item())
    # Neighbours, because memory ends at some level and does not come back: what stands out beyond a gap is luck.
    first = max(range(max(1, len(grid) - count + 1)), key=lambda i: sum(merits[i : i + count]))
    window = range(first, min(first + count, len(grid)))
    least = LEAST * max(merits[i] for i in window)
    return tuple(grid[i] for i in window if merits[i] > 0 and merits[i] >= least)
