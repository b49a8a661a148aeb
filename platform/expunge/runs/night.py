"""A night's folder: its plan, the folders of its jobs, and how it ended."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from expunge.runs import formats
from expunge.runs.document import Document, LostError
from expunge.runs.job import JobFolder
from expunge.runs.outcomes import JobOutcome, NightEnd, NightOutcome, NightPlan
from expunge.words import UnlearnJob


@dataclass(frozen=True)
class NightFolder:
    """The folder of a batch, named by the batch's id."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    def job(self, id: str) -> JobFolder:
        return JobFolder(self.path / id)

    @property
    def plan(self) -> NightPlan | None:
        """What was planned; None where the plan is missing or damaged."""
        return self._plan.read()

    def plan_once(self, compute: Callable[[], NightPlan]) -> NightPlan:
        """Return the plan, made and written first where there is none.

        Each job's `job.json` is there afterwards: it is a copy, and one that is lost costs no second plan, which would
        build on what the first one has promoted.
        """
        planned = self._plan.once(compute)
        for job in planned.jobs:
            self.job(job.id).job.once(lambda job=job: job)
        return planned

    @property
    def has_plan(self) -> bool:
        """Whether there is a plan, be it damaged."""
        return self._plan.path.exists()

    @property
    def has_ended(self) -> bool:
        """Whether the driver has written how the night ended, so that it can be read."""
        return self._end.read() is not None

    @property
    def outcome(self) -> NightOutcome | None:
        """How the night ended; None where it has not, or where any of what it left is missing or damaged."""
        try:
            return self.verdicts()
        except LostError:
            return None

    def verdicts(self) -> NightOutcome:
        """Return how the night ended. Raises LostError, which names the file, where one is missing or damaged."""
        return self._assemble(self._end.expect())

    def finish(self, planned: NightPlan, outcomes: Sequence[JobOutcome]) -> NightOutcome:
        """Write how the night ended: of each job, only what differs from what the job itself has left."""
        failed = {outcome.job.id: outcome.error or "" for outcome in outcomes if outcome.platform}
        undone = [outcome.job.id for outcome in outcomes if not outcome.promoted and self._promoted(outcome.job.id)]
        self._end.write(NightEnd(batch=self.id, failed=failed, undone=tuple(undone)))
        return NightOutcome.of(planned, outcomes)

    def restore(self) -> NightOutcome:
        """Return how a night ended that is over. If `night.json` is lost, it is written again from the jobs' own ends.

        Raises LostError, which names the file, where one of theirs is missing or damaged.
        """
        if not self.has_ended:
            found = self._assemble(NightEnd(batch=self.id))
            self.finish(found, found.outcomes)
        return self.verdicts()

    def advance(self) -> int:
        """Return how far the batch has got: a number that grows with its plan, each stage of a job, and each step."""
        return self.has_plan + sum(
            JobFolder(path.parent).progress.advance() for path in self.path.glob("*/progress.json")
        )

    def check_format(self) -> None:
        """Raise StorageError where the folder was written by a newer release."""
        formats.check_format(self.path)

    def mark_format(self) -> None:
        """Say that files of this release's format are written from here on. Raises StorageError and OSError."""
        formats.mark_format(self.path)

    def _assemble(self, end: NightEnd | NightOutcome) -> NightOutcome:
        if isinstance(end, NightOutcome):
            return end
        planned = self._plan.expect()
        return NightOutcome.of(planned, [_outcome(self.job(job.id), job, end) for job in planned.jobs])

    def _promoted(self, id: str) -> bool:
        end = self.job(id).end.read()
        return end is not None and end.promoted

    @property
    def _plan(self) -> Document[NightPlan]:
        return Document(self.path / "plan.json", formats.read_plan)

    @property
    def _end(self) -> Document[NightEnd | NightOutcome]:
        return Document(self.path / "night.json", formats.read_night)


def _outcome(folder: JobFolder, job: UnlearnJob, end: NightEnd) -> JobOutcome:
    if job.id in end.failed:
        return JobOutcome(job=job, error=end.failed[job.id], platform=True)
    outcome = folder.outcome_of(job)
    return outcome.with_promotion(False) if job.id in end.undone else outcome
