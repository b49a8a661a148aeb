"""What a night plans and how it ends, in memory and on disk.

On disk every fact is stored once. `plan.json` holds the jobs, and a job's `evidence.json`, `version.json` and
`hotfix.json` hold what its stages made, so `outcome.json` only says how a job ended, and `night.json` only holds what
the driver alone knows. `JobOutcome` and `NightOutcome` are assembled from these. The exception is `job.json`, the copy
of the job that its stages read: it is written again from the plan if it is lost.
"""

from collections.abc import Sequence
from typing import Self

from pydantic import Field

from expunge.types import CHAMPION, Evidence, ModelVersion, UnlearnJob, Value


class NightPlan(Value):
    """`plan.json`, written before anything runs: a resumed night must not plan from a registry that it changed."""

    batch: str
    jobs: tuple[UnlearnJob, ...]
    refused: dict[str, str]
    """Request id: why no job can take it. This counts as an attempt, so that a person looks at it in the end."""
    held: dict[str, str] = Field(default_factory=dict)
    """Request id: why it waits, through no fault of its own or of its model."""


class JobEnd(Value):
    """`outcome.json`: how the job ended. Unless there is an error, its stages' output is beside it."""

    error: str | None = None
    outdated: bool = False
    """True if what the job was planned on has changed since."""
    promoted: bool = False
    """True if the job made its version the champion."""


class JobOutcome(Value):
    """A job that succeeded (evidence, version, run_id, steps) or failed (error).

    `platform`: a service, a node or a disk caused the failure, not the requests or their model. `outdated`: what the
    job was planned on has changed since.
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

    @property
    def not_reproduced(self) -> frozenset[str]:
        """The ids of the new requests whose target the base model does not reproduce."""
        found = self.evidence.requests if self.evidence else ()
        new = {request.id for request in self.job.requests}
        return frozenset(r.request for r in found if r.verdict == "not_reproduced" and r.request in new)

    def with_promotion(self, promoted: bool) -> Self:
        """Return a copy whose version is the champion, or is not."""
        if self.version is None:
            return self
        others = {alias for alias in self.version.aliases if alias != CHAMPION}
        aliases = tuple(sorted({*others, CHAMPION} if promoted else others))
        return self.model_copy(update={"version": self.version.model_copy(update={"aliases": aliases})})


class NightEnd(Value):
    """`night.json`, written when a batch has ended: what only the driver knows."""

    batch: str
    failed: dict[str, str] = Field(default_factory=dict)
    """Job id: the platform's failure that it ended with."""
    undone: tuple[str, ...] = ()
    """Ids of jobs whose promotion had been undone by the time that the night was settled."""


class NightOutcome(NightPlan):
    """A finished night: its plan, and the outcome of every job."""

    outcomes: tuple[JobOutcome, ...]

    @classmethod
    def of(cls, planned: NightPlan, outcomes: Sequence[JobOutcome]) -> Self:
        plan = {name: getattr(planned, name) for name in NightPlan.model_fields}
        return cls(**plan, outcomes=tuple(outcomes))

    @property
    def all_passed(self) -> bool:
        """True if every request of the night is removed by a promoted version; one that is not reproduced is not.

        A replay's version is promoted by a person, so there it need not be.
        """
        return not self.left and not self.not_reproduced

    @property
    def not_reproduced(self) -> frozenset[str]:
        """The ids of the night's new requests that the base model does not reproduce: there is nothing to remove."""
        return frozenset().union(*(outcome.not_reproduced for outcome in self.outcomes))

    @property
    def left(self) -> frozenset[str]:
        """The ids of requests that go back to the queue or wait for a person; of a replay, what it does not remove."""
        new = {request.id for outcome in self.outcomes for request in outcome.job.requests}
        decided = (outcome for outcome in self.outcomes if outcome.promoted or outcome.job.replay)
        removed = {id for outcome in decided for id in outcome.passed}
        return frozenset({*self.refused, *self.held, *new} - removed - self.not_reproduced)
