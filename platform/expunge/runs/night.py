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
        """What was planned; None where the plan, or the job of one of its folders, is missing or damaged."""
        found = self._plan.read()
        if found is None:
            return None
        jobs = self._jobs(found)
        if None in jobs:
            return None
        return NightPlan(batch=found.batch, jobs=tuple(filter(None, jobs)), refused=found.refused, held=found.held)

    def plan_once(self, compute: Callable[[], NightPlan]) -> NightPlan:
        """Return the plan, made and written first where there is none. Each job's `job.json` is there afterwards.

        A plan of which one job is lost keeps the others: planned again, they would be trained again.
        """
        found = self.plan
        planned = self._with_known(compute()) if found is None else found
        for job in planned.jobs:
            folder = self.job(job.id)
            folder.job.once(lambda job=job: job)
        if found is None:  # last: a plan that can be read names only jobs that are there
            self._plan.set_aside()
            ids = tuple(job.id for job in planned.jobs)
            self._plan.write(PlanDocument(batch=planned.batch, jobs=ids, refused=planned.refused, held=planned.held))
        return planned

    def _jobs(self, written: PlanDocument) -> list[UnlearnJob | None]:
        return [job if isinstance(job, UnlearnJob) else self.job(job).job.read() for job in written.jobs]

    def _with_known(self, planned: NightPlan) -> NightPlan:
        """Put the jobs that an incomplete plan still has in the place of those of the same model."""
        written = self._plan.read()
        known = {job.model: job for job in self._jobs(written) if job is not None} if written else {}
        return planned.model_copy(update={"jobs": tuple(known.get(job.model, job) for job in planned.jobs)})

    @property
    def has_plan(self) -> bool:
        """Whether there is a plan, be it damaged."""
        return self._plan.path.exists()

    @property
    def has_ended(self) -> bool:
        """Whether the driver has written how the night ended."""
        return self._end.path.exists()

    @property
    def outcome(self) -> NightOutcome | None:
        """How the night ended; None where it has not, or where any of what it left is missing or damaged."""
        end = self._end.read()
        return end if end is None or isinstance(end, NightOutcome) else self._assemble(end)

    def finish(self, planned: NightPlan, outcomes: Sequence[JobOutcome]) -> NightOutcome:
        """Write how the night ended: of each job, only what differs from what the job itself has left."""
        failed = {outcome.job.id: outcome.error or "" for outcome in outcomes if outcome.platform}
        undone = [outcome.job.id for outcome in outcomes if not outcome.promoted and self._promoted(outcome.job.id)]
        self._end.write(NightEnd(batch=self.id, failed=failed, undone=tuple(undone)))
        return NightOutcome.of(planned, outcomes)

    def restore(self) -> NightOutcome | None:
        """Write the end of a night whose `night.json` is lost, where every job has left its own; return its outcome."""
        planned, found = self.plan, self._assemble(NightEnd(batch=self.id))
        return None if planned is None or found is None else self.finish(planned, found.outcomes)

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
