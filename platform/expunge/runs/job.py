"""A job's folder: every file in it, which one stage writes and others read."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from expunge.errors import ExpungeError, StorageError
from expunge.runs import formats
from expunge.runs.document import Document, LostError
from expunge.runs.failures import GivenUp
from expunge.runs.outcomes import JobEnd, JobOutcome
from expunge.runs.progress import Progress
from expunge.types import Baseline, Evidence, GradientMode, Hotfix, ModelVersion, PreparedJob, UnlearnJob


@dataclass(frozen=True)
class JobFolder:
    """All that a stage is given and that Ray carries: the job is in its folder, and its tensors in the blob store."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def job(self) -> Document[UnlearnJob]:
        """The job as it was planned: the plan's copy for its stages."""
        return Document(self.path / "job.json", partial(formats.read_job, id=self.id))

    @property
    def prepared(self) -> Document[PreparedJob]:
        return Document(self.path / "prepared.json", formats.read_prepared)

    @property
    def baseline(self) -> Document[Baseline]:
        return Document(self.path / "baseline.json", Baseline.model_validate_json)

    @property
    def mode(self) -> Document[GradientMode]:
        return Document(self.path / "mode.json", formats.read_mode)

    @property
    def hotfix(self) -> Document[Hotfix]:
        """The result of training; its weights are in `weights`."""
        return Document(self.path / "hotfix.json", partial(formats.read_hotfix, weights=self.weights))

    @property
    def evidence(self) -> Document[Evidence]:
        return Document(self.path / "evidence.json", Evidence.model_validate_json)

    @property
    def version(self) -> Document[ModelVersion]:
        """The version as it was registered, before any promotion."""
        return Document(self.path / "version.json", ModelVersion.model_validate_json)

    @property
    def end(self) -> Document[JobEnd]:
        """How the job ended. It is written last; after that the job is not run again."""
        return Document(self.path / "outcome.json", formats.read_end)

    @property
    def progress(self) -> Progress:
        return Progress(self.path / "progress.json")

    @property
    def weights(self) -> Path:
        """The folder of the hotfix's weights, in diffusers' own format."""
        return self.path / "hotfix"

    @property
    def champion(self) -> Path:
        """The folder of the weights that training starts from, fetched from the registry."""
        return self.path / "warm_start"

    @property
    def checkpoints(self) -> Path:
        """The folder of Ray Train's state, and of the checkpoints unless `training.checkpoint_url` is set."""
        return self.path / "train"

    @property
    def outcome(self) -> JobOutcome | None:
        """How the job ended, assembled from its stages' files; None if one of them is missing or damaged.

        `hotfix.json` may be: the version has its weights, and a lost number of steps is not worth a second training.
        """
        try:
            return self.outcome_of(self.job.expect())
        except LostError:
            return None

    def outcome_of(self, job: UnlearnJob) -> JobOutcome:
        """Return how `job`, whose folder this is, ended. Raises LostError if one of its stages' files is lost."""
        end = self.end.expect()
        if end.error is not None:
            return JobOutcome(job=job, error=end.error, outdated=end.outdated)
        evidence = self.evidence.expect()
        if evidence.integrity is None:  # the base model reproduces none of the requests, so there is no hotfix
            return JobOutcome(job=job, evidence=evidence)
        version, hotfix = self.version.expect(), self.hotfix.read()
        steps = None if hotfix is None else hotfix.steps
        outcome = JobOutcome(job=job, evidence=evidence, version=version, run_id=version.run_id, steps=steps)
        return outcome.with_promotion(end.promoted)

    def check_format(self) -> None:
        """Raise StorageError if the job's night was written by a newer release."""
        formats.check_format(self.path.parent)

    def give_up(self, error: ExpungeError) -> None:
        """Record an error of FINAL for the process that started the workers."""
        self._given_up.write(GivenUp.because(error))

    def start_anew(self) -> None:
        """Forget why an earlier training gave up."""
        self._given_up.path.unlink(missing_ok=True)

    @property
    def failure(self) -> ExpungeError | None:
        """The error with which training gave up, if it did."""
        if not self._given_up.path.exists():
            return None
        found = self._given_up.read()
        if found is None:
            hint = "run the night again: it continues where it stopped"
            return StorageError(f"{self._given_up.path} cannot be read", hint=hint)
        return found.error()

    @property
    def _given_up(self) -> Document[GivenUp]:
        return Document(self.path / "failed.json", GivenUp.model_validate_json)
