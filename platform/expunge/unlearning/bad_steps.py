"""Count the steps that were skipped because a gradient was not finite, and give up after too many."""

from dataclasses import dataclass, field

from expunge.runs.failures import Hopeless
from expunge.types import UnlearnJob
from expunge.unlearning.objectives import ForgetObjective


@dataclass
class BadSteps:
    """Counts skipped steps, and gives up after `training.max_bad_steps` in a row."""

    job: UnlearnJob
    total: int = 0
    _row: int = 0
    _suspects: set[str] = field(default_factory=set)

    def __call__(self, bad: tuple[int, ...], objectives: tuple[ForgetObjective, ...]) -> None:
        """Count a step. bad: the indices of the objectives whose gradient is not finite, the retain objective last.

        Raises Hopeless after too many in a row, naming the requests of those objectives.
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
        blamed = ", ".join(sorted(self._suspects)) or "the retain set"
        raise Hopeless(
            f"job {self.job.id}: {self._row} steps in a row had a gradient that is not finite, for {blamed}",
            hint="lower training.learning_rate, or withdraw these requests",
        )
