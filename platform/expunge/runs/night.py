"""A night's folder: its plan, the folders of its jobs, and how it ended."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from expunge.errors import InputError
from expunge.runs import formats
from expunge.runs.document import Document, LostError
from expunge.runs.job import JobFolder
from expunge.runs.outcomes import JobOutcome, NightEnd, NightOutcome, NightPlan
from expunge.types import UnlearnJob

REPLAY = "replay-"
"""How the ids of replays begin. Their batches hold no request, because a replay moves none."""


def how_to_continue(batch: str) -> str:
    """Say what to do to go on with a batch that was stopped."""
    replay = batch.startswith(REPLAY)
    return "repeat the `expunge replay` that began it" if replay else f"run `expunge night --batch {batch}` to continue"


def refuse_replay(batch: str) -> None:
    """Raise InputError if this batch is a replay, into which a night would drain the queue."""
    if batch.startswith(REPLAY):
        raise InputError(f"batch {batch} is a replay", hint=how_to_continue(batch))


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
        """The plan; None if it is missing or damaged."""
        return self._plan.read()

    def plan_once(self, compute: Callable[[], NightPlan]) -> NightPlan:
        """Return the plan; if there is none, compute and write it. Each job's `job.json` is there afterwards.

        It is a copy: if it is lost, nothing is planned again, because a second plan would build on a champion that the
        first one has promoted, and train and register the same removals under another id.
        """
        planned = self._plan.once(compute)
        for job in planned.jobs:
            self.job(job.id).job.once(lambda job=job: job)
        return planned

    @property
    def jobs(self) -> tuple[JobFolder, ...]:
        """The folders of jobs that are there."""
        return tuple(JobFolder(path.parent) for path in sorted(self.path.glob("*/job.json")))

    def redact(self, change: Callable[[UnlearnJob], UnlearnJob]) -> None:
        """Writes every job of the plan again as `change` returns it, and so in the outcome of a night of format 1."""
        planned, end = self._plan.read(), self._end.read()
        if planned is not None:
            self._plan.write(planned.model_copy(update={"jobs": tuple(map(change, planned.jobs))}))
        if isinstance(end, NightOutcome):
            outcomes = [each.model_copy(update={"job": change(each.job)}) for each in end.outcomes]
            update = {"jobs": tuple(map(change, end.jobs)), "outcomes": tuple(outcomes)}
            self._end.write(end.model_copy(update=update))

    @property
    def has_plan(self) -> bool:
        """True if there is a plan, even a damaged one."""
        return self._plan.path.exists()

    @property
    def has_ended(self) -> bool:
        """True if the driver has written how the night ended, and the file can be read."""
        return self._end.read() is not None

    @property
    def outcome(self) -> NightOutcome | None:
        """How the night ended; None if it has not, or if one of its files is missing or damaged."""
        try:
            return self.verdicts()
        except LostError:
            return None

    def verdicts(self) -> NightOutcome:
        """Return how the night ended. Raises LostError, which names the file, if one is missing or damaged."""
        return self._assemble(self._end.expect())

    def finish(self, planned: NightPlan, outcomes: Sequence[JobOutcome]) -> NightOutcome:
        """Write how the night ended; of each job, only what the job's own files do not say."""
        failed = {outcome.job.id: outcome.error or "" for outcome in outcomes if outcome.platform}
        undone = [outcome.job.id for outcome in outcomes if not outcome.promoted and self._promoted(outcome.job.id)]
        self._end.write(NightEnd(batch=self.id, failed=failed, undone=tuple(undone)))
        return NightOutcome.of(planned, outcomes)

    def restore(self) -> NightOutcome:
        """Return how the night ended; if `night.json` is lost, write it again first, from the jobs' own files.

        Raises LostError, which names the file, if one of those is missing or damaged.
        """
        if self.has_ended:
            return self.verdicts()
        found = self._assemble(NightEnd(batch=self.id))
        return self.finish(found, found.outcomes)

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
