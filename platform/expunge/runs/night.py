"""A night's folder: its plan, the folders of its jobs, and how it ended."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from expunge.runs import formats
from expunge.runs.document import Document
from expunge.runs.job import JobFolder
from expunge.runs.outcomes import JobOutcome, NightEnd, NightOutcome, NightPlan, PlanDocument
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
        """The plan; None if it, or the `job.json` of one of its jobs, is missing or damaged."""
        found = self._plan.read()
        if found is None:
            return None
        jobs = [job if isinstance(job, UnlearnJob) else self.job(job).job.read() for job in found.jobs]
        if None in jobs:
            return None
        return NightPlan(batch=found.batch, jobs=tuple(filter(None, jobs)), refused=found.refused, held=found.held)

    def plan_once(self, compute: Callable[[], NightPlan]) -> NightPlan:
        """Return the plan; if there is none, compute and write it. Each job's `job.json` is there afterwards."""
        found = self.plan
        planned = compute() if found is None else found
        for job in planned.jobs:
            folder = self.job(job.id)
            folder.job.once(lambda job=job: job)
        if found is None:  # last: a plan that can be read names only jobs that are there
            self._plan.set_aside()
            ids = tuple(job.id for job in planned.jobs)
            self._plan.write(PlanDocument(batch=planned.batch, jobs=ids, refused=planned.refused, held=planned.held))
        return planned

    @property
    def has_plan(self) -> bool:
        """True if there is a plan, even a damaged one."""
        return self._plan.path.exists()

    @property
    def has_ended(self) -> bool:
        """True if the driver has written how the night ended."""
        return self._end.path.exists()

    @property
    def outcome(self) -> NightOutcome | None:
        """How the night ended; None if it has not, or if one of its files is missing or damaged."""
        end = self._end.read()
        return end if end is None or isinstance(end, NightOutcome) else self._assemble(end)

    def finish(self, planned: NightPlan, outcomes: Sequence[JobOutcome]) -> NightOutcome:
        """Write how the night ended; of each job, only what the job's own files do not say."""
        failed = {outcome.job.id: outcome.error or "" for outcome in outcomes if outcome.platform}
        undone = [outcome.job.id for outcome in outcomes if not outcome.promoted and self._promoted(outcome.job.id)]
        self._end.write(NightEnd(batch=self.id, failed=failed, undone=tuple(undone)))
        return NightOutcome.of(planned, outcomes)

    def restore(self) -> NightOutcome | None:
        """Write a lost `night.json` again and return the outcome; None if a job's own files are not complete."""
        planned, found = self.plan, self._assemble(NightEnd(batch=self.id))
        return None if planned is None or found is None else self.finish(planned, found.outcomes)

    def advance(self) -> int:
        """Return how far the batch has got: a number that grows with its plan, each stage of a job, and each step."""
        return self.has_plan + sum(
            JobFolder(path.parent).progress.advance() for path in self.path.glob("*/progress.json")
        )

    def check_format(self) -> None:
        """Raise StorageError if the folder was written by a newer release."""
        formats.check_format(self.path)

    def mark_format(self) -> None:
        """Record that new files have this release's format. Raises StorageError and OSError."""
        formats.mark_format(self.path)

    def _assemble(self, end: NightEnd) -> NightOutcome | None:
        planned = self.plan
        if planned is None:
            return None
        outcomes = [_outcome(self.job(job.id), job, end) for job in planned.jobs]
        found = [outcome for outcome in outcomes if outcome is not None]
        return NightOutcome.of(planned, found) if len(found) == len(outcomes) else None

    def _promoted(self, id: str) -> bool:
        end = self.job(id).end.read()
        return end is not None and end.promoted

    @property
    def _plan(self) -> Document[PlanDocument]:
        return Document(self.path / "plan.json", formats.read_plan)

    @property
    def _end(self) -> Document[NightEnd | NightOutcome]:
        return Document(self.path / "night.json", formats.read_night)


def _outcome(folder: JobFolder, job: UnlearnJob, end: NightEnd) -> JobOutcome | None:
    if job.id in end.failed:
        return JobOutcome(job=job, error=end.failed[job.id], platform=True)
    outcome = folder.outcome
    return outcome.with_promotion(False) if outcome and job.id in end.undone else outcome
