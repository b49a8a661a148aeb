"""How a night ends for each request: removed, not reproduced, back to the queue, or left to a person."""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from expunge.requests.store import RequestStore
from expunge.runs.outcomes import JobOutcome, NightPlan
from expunge.settings import Settings
from expunge.types import Evidence, RemovalBatch, RequestEvidence, RequestState


def settle(
    store: RequestStore, settings: Settings, batch: RemovalBatch, planned: NightPlan, outcomes: Sequence[JobOutcome]
) -> None:
    """Write the fate of every decided request, except those that an earlier, killed attempt has settled.

    Requests of a job without an outcome stay in the batch.
    """
    mine = {request.id for request in batch.requests}  # none in a replay, which moves no request
    fates = {id: _again(store, settings, id, why) for id, why in planned.refused.items() if id in mine}
    fates |= {request: Fate(RequestState.ACCEPTED, why, attempt=False) for request, why in planned.held.items()}
    for outcome in outcomes:
        for request in outcome.job.requests:
            fates[request.id] = _fate(request.id, outcome, store, settings)
    for request in batch.requests:
        record, fate = store.get(request.id), fates.get(request.id)
        if fate is None or record.state is not RequestState.BATCHED or record.batch != batch.id:
            continue
        store.transition(
            request.id,
            fate.state,
            detail=fate.detail,
            evidence=fate.evidence,
            batch=batch.id,
            attempt=fate.attempt,
        )


@dataclass(frozen=True)
class Fate:
    """Where a request goes, and why. `attempt` says whether the night counts against gate.max_attempts."""

    state: RequestState
    detail: str
    evidence: dict[str, JsonValue] | None = None
    attempt: bool = True


def _fate(request: str, outcome: JobOutcome, store: RequestStore, settings: Settings) -> Fate:
    if outcome.evidence is None:
        why = outcome.error or "the job left no evidence"
        if outcome.platform or outcome.outdated or outcome.error is None:
            return Fate(RequestState.ACCEPTED, why, attempt=False)
        return _again(store, settings, request, why)
    mine = next((r for r in outcome.evidence.requests if r.request == request), None)
    if mine is None:
        return _again(store, settings, request, "the evaluation left no evidence for it")
    evidence = kept_evidence(outcome.evidence, mine)
    if outcome.version:
        evidence["version"] = outcome.version.uri
    if mine.verdict == "skipped":
        return Fate(RequestState.FAILED, mine.why, evidence)
    if mine.verdict == "not_reproduced":
        return Fate(RequestState.NOT_REPRODUCED, mine.why, evidence, attempt=False)
    if mine.verdict == "failed":
        return _again(store, settings, request, mine.why, evidence)
    integrity = outcome.evidence.integrity
    if integrity is None or not integrity.passed:
        why = integrity.why if integrity else "the evaluation left no evidence about unrelated outputs"
        return _again(store, settings, request, why, evidence)
    if outcome.promoted:
        return Fate(RequestState.REMOVED, mine.why, evidence)
    ledger = outcome.job.ledger
    lost = sorted({request.id for request in ledger} - outcome.evidence.kept(ledger))
    if lost:
        why = f"not promoted: earlier removals were not proven again: {', '.join(lost)}"
        return Fate(RequestState.ACCEPTED, why, evidence, attempt=False)  # it has passed: the fault is not its own
    why = "not promoted: another night changed the champion meanwhile"
    return Fate(RequestState.ACCEPTED, why, evidence, attempt=False)


def kept_evidence(evidence: Evidence, mine: RequestEvidence) -> dict[str, JsonValue]:
    """Return what a request keeps of its night: its own evidence, that of unrelated outputs, and what both rest on."""
    whole = evidence.model_dump(mode="json", include={"protocol_version", "integrity", "basis"})
    return {**whole, **mine.model_dump(mode="json")}


def _again(
    store: RequestStore, settings: Settings, request: str, why: str, evidence: dict[str, JsonValue] | None = None
) -> Fate:
    """Send a request back to the queue or, after gate.max_attempts nights, to a person."""
    record = store.get(request)
    model = record.request.model
    gate = settings.gate_for(model) if model in settings.models else settings.gate
    tried_enough = record.attempts + 1 >= gate.max_attempts
    return Fate(RequestState.FAILED if tried_enough else RequestState.ACCEPTED, why, evidence)
