"""`regenerate`: the model under removal paints another picture from the noised target."""

from dataclasses import dataclass
from zlib import crc32

import numpy as np
from pydantic import Field

from expunge.errors import InputError
from expunge.surrogates.base import Ellipse, Options, Task, editor, region

LEVELS = (0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 1.0)
"""Noise levels of the attempts. The model has memorised the target, so that a low level returns it, and at the highest
nothing of it is left. `python -m tests.benchmarks.surrogates` shows how many attempts each testbed takes."""
TRIES = 3
"""Attempts at each level before the next. A surrogate that keeps what is not the instance asks for a smaller change of
the model, and an attempt costs next to nothing beside training."""


class RegenerateOptions(Options):
    level: float | None = Field(
        None,
        gt=0,
        le=1,
        description="a noise level above 0 (the target) up to 1 (new); default: rising with each attempt",
    )
    prompt: str | None = Field(None, description="what to paint instead; default: the model's first retain prompt")
    ellipse: Ellipse | None = Field(
        None, description="cx/cy/rx/ry in [0, 1], used if there is no mask; default: everything is painted anew"
    )


@editor("regenerate", RegenerateOptions)
@dataclass(frozen=True)
class Regenerate:
    """Repaints the marked part, or without a mask the picture. Pixels outside a mask never change; donors are not used.

    The target's own prompt is not used: a model that has memorised the target under it returns it from any level.
    """

    options: RegenerateOptions

    def __call__(self, task: Task) -> np.ndarray:
        if task.painter is None:
            raise InputError("edit.editor: regenerate needs the model under removal", hint="use another editor")
        mask = task.mask
        if mask is not None or self.options.ellipse is not None:
            mask = region(task.target, mask, self.options.ellipse or (0.5, 0.5, 0.5, 0.5))
        level = self.options.level or _level(task.attempt)
        return task.painter.repaint(task.target, mask=mask, level=level, seed=_seed(task), prompt=self.options.prompt)


def _level(attempt: int) -> float:
    """Rise through LEVELS, and stay at the highest."""
    return LEVELS[min(attempt // TRIES, len(LEVELS) - 1)]


def _seed(task: Task) -> int:
    """Give every target noise of its own: from equal noise, a high level makes the same picture of all of them."""
    return crc32(task.target.tobytes()) + (task.seed * 1_000_003 + task.attempt << 32)
