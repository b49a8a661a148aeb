"""A night as one tenant may see it: its own requests, and the verdicts about them."""

import re

from expunge.errors import NotFoundError
from expunge.runs.document import LostError
from expunge.runs.night import NightFolder
from expunge.runs.outcomes import NightOutcome
from expunge.section import IDENTIFIER
from expunge.service.access import Visit
from expunge.service.schemas import Batch, Verdict


def batch_of(batch_id: str, visit: Visit) -> Batch:
    """Raises NotFoundError also for a batch that none of the tenant's requests was ever in."""
    if not re.fullmatch(IDENTIFIER, batch_id):
        raise NotFoundError("no such batch")
    record = visit.store.batch(batch_id)
    mine = visit.store.list(batch=batch_id, tenant=visit.caller.tenant, history=False)
    if not mine:
        raise NotFoundError("no such batch")
    ids = {each.request.id for each in mine}
    night = NightFolder(visit.platform.settings.runs / batch_id)
    try:
        verdicts = _verdicts(night.verdicts(), ids) if night.has_ended else None
    except LostError:
        verdicts = None
    requests = [id for id in record.requests if id in ids]
    return Batch(id=record.id, created=record.created, closed=record.closed, requests=requests, verdicts=verdicts)


def _verdicts(night: NightOutcome, ids: set[str]) -> list[Verdict]:
    found = []
    for outcome in night.outcomes:
        judged = outcome.evidence.requests if outcome.evidence else ()
        for each in judged:
            if each.request in ids:
                about = {"request": each.request, "model": outcome.job.model, "promoted": outcome.promoted}
                found.append(Verdict(**about, verdict=each.verdict, why=each.why))
    for outcome in night.outcomes:
        if outcome.evidence is None:
            found += [_without(r.id, outcome.job.model, "error") for r in outcome.job.requests if r.id in ids]
    for word, requests in (("refused", night.refused), ("waits", night.held)):
        found += [_without(id, "", word) for id in requests if id in ids]
    return found


def _without(request: str, model: str, verdict: str) -> Verdict:
    """A request that was not judged. Why is the operator's affair: the text may name files and other requests."""
    return Verdict(request=request, model=model, verdict=verdict, why="it was not judged", promoted=False)
