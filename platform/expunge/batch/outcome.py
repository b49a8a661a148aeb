"""How a night ends for each request: removed, back to the queue, or left to a person."""

from collections.abc import Sequence

from expunge.batch.plan import Plan
from expunge.requests.store import RequestStore
from expunge.settings import Settings
from expunge.words import Evidence, ModelVersion, RemovalBatch, RequestState, UnlearnJob, Word


class JobOutcome(Word):
    """A job that went through (evidence, version, run_id, steps) or did not (error)."""

    job: UnlearnJob
    evidence: Evidence | None = None
    version: ModelVersion | None = None
    run_id: str | None = None
    steps: int | None = None
    error: str | None = None

    @property
    def promoted(self) -> bool:
        return self.version is not None and "champion" in self.version.aliases

    @property
    def passed(self) -> frozenset[str]:
        return self.evidence.passed if self.evidence else frozenset()


class NightOutcome(Plan):
    """What a finished night leaves: its plan, and the outcome of every job."""

    outcomes: tuple[JobOutcome, ...]

    @property
    def all_passed(self) -> bool:
        """Every request of the night is removed by a promoted version."""
        removed = {r.id for o in self.outcomes if o.promoted for r in o.job.requests if r.id in o.passed}
        return not self.refused and all(r.id in removed for o in self.outcomes for r in o.job.requests)


def settle(
    store: RequestStore, settings: Settings, batch: RemovalBatch, planned: Plan, outcomes: Sequence[JobOutcome]
) -> None:
    """Write every request's fate to the store; those that an earlier, killed attempt has settled are left alone."""
    fates: dict[str, tuple[RequestState, str, dict | None]] = {}
    for request, why in planned.refused.items():
        fates[request] = (RequestState.ACCEPTED, why, None)  # the operator's to fix, not the requester's
    for outcome in outcomes:
        for request in outcome.job.requests:
            fates[request.id] = _fate(request.id, outcome, store.get(request.id).attempts, settings)
    for request in batch.requests:
        record = store.get(request.id)
        if record.state is not RequestState.BATCHED or record.batch != batch.id:
            continue
        state, detail, evidence = fates[request.id]
        store.transition(request.id, state, detail=detail, evidence=evidence, batch=batch.id)


def _fate(
    request: str, outcome: JobOutcome, attempts: int, settings: Settings
) -> tuple[RequestState, str, dict | None]:
    again = RequestState.ACCEPTED
    if attempts + 1 >= settings.gate_for(outcome.job.model).max_attempts:
        again = RequestState.FAILED
    if outcome.evidence is None:  # the night failed, not the request: it waits as long as it takes
        return RequestState.ACCEPTED, outcome.error or "the job left no evidence", None
    mine = next((r for r in outcome.evidence.requests if r.request == request), None)
    if mine is None:
        return again, "the evaluation left no evidence for it", None
    evidence = {"integrity": outcome.evidence.integrity.model_dump(), **mine.model_dump()}
    if outcome.version:
        evidence["version"] = outcome.version.uri
    if mine.verdict == "skipped":
        return RequestState.FAILED, mine.why, evidence
    if mine.verdict == "failed":
        return again, mine.why, evidence
    if not outcome.evidence.integrity.passed:
        return again, outcome.evidence.integrity.why, evidence
    if not outcome.promoted:
        return again, _held_back(outcome), evidence
    return RequestState.REMOVED, mine.why, evidence


def _held_back(outcome: JobOutcome) -> str:
    """Why a version whose integrity holds, and which removes the request, was not promoted."""
    lost = sorted({request.id for request in outcome.job.ledger} - outcome.passed)
    if lost:
        return f"not promoted: earlier removals were not proven again: {', '.join(lost)}"
    return "not promoted: another night changed the champion meanwhile"
