"""Steps that were skipped as a gradient was not finite, and when there are too many of them."""

from dataclasses import dataclass, field

from expunge.runs.failures import Hopeless
from expunge.unlearning.objectives import ForgetObjective
from expunge.words import UnlearnJob


@dataclass
class BadSteps:
    """Counts them, and gives up after `training.max_bad_steps` in a row."""

    job: UnlearnJob
    total: int = 0
    _row: int = 0
    _suspects: set[str] = field(default_factory=set)

    def __call__(self, bad: tuple[int, ...], objectives: tuple[ForgetObjective, ...]) -> None:
        """Count a step. bad: the indices of the objectives whose gradient is not finite, the retain objective last.

        Raises Hopeless, with the requests whose objectives they were.
        """
        if not bad:
            self._row, self._suspects = 0, set()
            return
        self.total += 1
        self._row += 1
        named = [self.job.everything[r].id for k in bad if k < len(objectives) for r in objectives[k].requests]
        self._suspects |= set(named)
        if self._row < self.job.training.max_bad_steps:
            return
        whose = f"of {', '.join(sorted(self._suspects))}" if self._suspects else "of the retain set"
        raise Hopeless(
            f"job {self.job.id}: {self._row} steps in a row had a gradient that is not finite, {whose}",
            hint="lower training.learning_rate, or withdraw these requests",
        )
