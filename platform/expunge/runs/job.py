"""A job's folder: every name in it, and what a stage finds and leaves there."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from expunge.errors import ExpungeError, StorageError
from expunge.runs import formats
from expunge.runs.document import Document
from expunge.runs.failures import GivenUp
from expunge.runs.outcomes import JobEnd, JobOutcome
from expunge.runs.progress import Progress
from expunge.words import Evidence, Hotfix, ModelVersion, PreparedJob, UnlearnJob, Word


class GradientMode(Word):
    """What `training.tasks = "auto"` came to when the job first started."""

    tasks: Literal["request", "batch"]


@dataclass(frozen=True)
class JobFolder:
    """All that a stage is given and that Ray carries: the job lies in its folder and the tensors in the blob store."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def job(self) -> Document[UnlearnJob]:
        """The job as it was planned."""
        return Document(self.path / "job.json", partial(formats.read_job, id=self.id))

    @property
    def prepared(self) -> Document[PreparedJob]:
        return Document(self.path / "prepared.json", formats.read_prepared)

    @property
    def mode(self) -> Document[GradientMode]:
        return Document(self.path / "mode.json", GradientMode.model_validate_json)

    @property
    def hotfix(self) -> Document[Hotfix]:
        """What training made; its weights lie in `weights`."""
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
        """Written last: the job is not run again."""
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
        """The folder that Ray Train keeps its state in, and the checkpoints unless they have a URL of their own."""
        return self.path / "train"

    @property
    def outcome(self) -> JobOutcome | None:
        """How the job ended, put together from what its stages left; None where any of it is missing or damaged."""
        end, job = self.end.read(), self.job.read()
        if end is None or job is None:
            return None
        if end.error is not None:
            return JobOutcome(job=job, error=end.error, outdated=end.outdated)
        evidence, version, hotfix = self.evidence.read(), self.version.read(), self.hotfix.read()
        if evidence is None or version is None or hotfix is None:
            return None
        outcome = JobOutcome(job=job, evidence=evidence, version=version, run_id=version.run_id, steps=hotfix.steps)
        return outcome.with_promotion(end.promoted)

    def check_format(self) -> None:
        """Raise StorageError where the night that the job is of was written by a newer release."""
        formats.check_format(self.path.parent)

    def give_up(self, error: ExpungeError) -> None:
        """Leave one of FINAL for the process that started the workers."""
        self._given_up.write(GivenUp.because(error))

    def start_anew(self) -> None:
        """Forget why an earlier training gave up."""
        self._given_up.path.unlink(missing_ok=True)

    @property
    def failure(self) -> ExpungeError | None:
        """Why training gave up, where it did."""
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
