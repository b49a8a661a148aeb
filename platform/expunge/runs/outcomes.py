"""What a night plans and how it ends: as the platform passes it around, and as it lies on disk.

On disk every fact has one home. `plan.json` holds the jobs, and a job's `evidence.json`, `version.json` and
`hotfix.json` what its stages made, so that `outcome.json` only says how the job ended, and `night.json` what the driver
alone knows. `JobOutcome` and `NightOutcome` are put together from these. The one copy is a job's `job.json`, which its
stages read and which is written again from the plan.
"""

from collections.abc import Sequence
from typing import Self

from pydantic import Field

from expunge.words import CHAMPION, Evidence, ModelVersion, UnlearnJob, Word


class NightPlan(Word):
    """`plan.json`, written before anything runs: a resumed night must not see the registry it has itself changed."""

    batch: str
    jobs: tuple[UnlearnJob, ...]
    refused: dict[str, str]
    """Request id: why no job can take it. It counts as an attempt: after some nights a person has to look."""
    held: dict[str, str] = Field(default_factory=dict)
    """Request id: why it waits, through no fault of its own or of its model."""


class JobEnd(Word):
    """`outcome.json`: how the job ended. What its stages made lies beside it, unless there is an error."""

    error: str | None = None
    outdated: bool = False
    """Whether what the job was planned on has changed since."""
    promoted: bool = False
    """Whether the job made its version the champion."""


class JobOutcome(Word):
    """A job that went through (evidence, version, run_id, steps) or did not (error).

    `platform` says that a service, a node or a disk failed it, not the requests or their model; `outdated` that what it
    was planned on has changed since.
    """

    job: UnlearnJob
    evidence: Evidence | None = None
    version: ModelVersion | None = None
    run_id: str | None = None
    steps: int | None = None
    error: str | None = None
    platform: bool = False
    outdated: bool = False

    @property
    def promoted(self) -> bool:
        return self.version is not None and CHAMPION in self.version.aliases

    @property
    def passed(self) -> frozenset[str]:
        return self.evidence.passed if self.evidence else frozenset()

    def with_promotion(self, promoted: bool) -> Self:
        """Return it with a version that is the champion, or is not."""
        if self.version is None:
            return self
        others = {alias for alias in self.version.aliases if alias != CHAMPION}
        aliases = tuple(sorted({*others, CHAMPION} if promoted else others))
        return self.model_copy(update={"version": self.version.model_copy(update={"aliases": aliases})})


class NightEnd(Word):
    """`night.json`, where a batch has ended: what the driver knows and no job does."""

    batch: str
    failed: dict[str, str] = Field(default_factory=dict)
    """Job id: how the platform failed it, to the last."""
    undone: tuple[str, ...] = ()
    """Ids of jobs whose promotion was gone again when the night was settled."""


class NightOutcome(NightPlan):
    """A finished night: its plan, and the outcome of every job."""

    outcomes: tuple[JobOutcome, ...]

    @classmethod
    def of(cls, planned: NightPlan, outcomes: Sequence[JobOutcome]) -> Self:
        plan = {name: getattr(planned, name) for name in NightPlan.model_fields}
        return cls(**plan, outcomes=tuple(outcomes))

    @property
    def all_passed(self) -> bool:
        """Every request of the night is removed by a promoted version."""
        removed = {r.id for o in self.outcomes if o.promoted for r in o.job.requests if r.id in o.passed}
        decided = not self.refused and not self.held
        return decided and all(r.id in removed for o in self.outcomes for r in o.job.requests)
