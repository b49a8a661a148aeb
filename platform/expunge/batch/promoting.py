"""Replace a model's champion because a person says so: what that does to its removals, and how it is carried out.

A line in the audit trail of every request that is concerned comes first, then the alias, then the requests' states. A
kill in between loses nothing: the same command finishes the work, and the next night takes in every removed request
that its champion does not hold.
"""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from expunge.batch.settle import kept_evidence
from expunge.batch.webhooks import settle_unconfirmed
from expunge.errors import ExpungeError, NotFoundError
from expunge.registry.artifacts import ledger
from expunge.registry.ledgers import Contents, only_in
from expunge.registry.tracking import Tracker
from expunge.registry.uploading import record_verification
from expunge.registry.versions import champion, promote, reinstate
from expunge.requests.leases import lease
from expunge.requests.outbox import Event, Notice
from expunge.requests.store import RequestStore
from expunge.runs.locks import promotion_lock
from expunge.types import ModelVersion, RequestState

WAITING = (RequestState.ACCEPTED, RequestState.FAILED)


class OvertakenError(ExpungeError):
    """Somebody else has replaced the champion since this change was weighed."""


@dataclass(frozen=True)
class Change:
    """What a new champion would do to the removals of its model, by request id."""

    before: ModelVersion | None
    after: Contents
    resurfacing: tuple[str, ...]
    """Removed today, and not by the new champion."""
    waiting: tuple[str, ...]
    """In the queue or with a person today, and shown to be removed by the new champion."""

    @property
    def concerned(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.after.ledger.requests, *self.resurfacing)))

    def said(self, act: str, by: str) -> str:
        over = self.before.uri if self.before else "no champion"
        return f"{act} of {self.after.version.uri} over {over} by {by}"


def weigh(store: RequestStore, tracker: Tracker, after: Contents) -> Change:
    """Return what making `after` the champion would do; changes nothing."""
    model = after.version.name
    removed = store.ids(RequestState.REMOVED, [model]).get(model, [])
    today = tuple(dict.fromkeys((*ledger(tracker, model).requests, *removed)))
    waits = {id for state in WAITING for id in store.ids(state, [model]).get(model, [])}
    proven = [id for id in after.ledger.requests if id in after.evidence.passed]
    return Change(
        before=champion(tracker, model),
        after=after,
        resurfacing=only_in(today, after.ledger.requests),
        waiting=tuple(id for id in proven if id in waits),
    )


def roll_back(store: RequestStore, tracker: Tracker, change: Change, by: str) -> ModelVersion:
    """Make a former champion the champion again; what resurfaces goes back to the queue.

    What it removes and still waits stays in the queue, because nothing has verified it since. Raises OvertakenError,
    and InputError if the version never was champion.
    """
    with _replacing(store, tracker, change, "rollback", change.said("rollback", by)):
        done = reinstate(tracker, change.after.version)
        _resurface(store, change, by)
    return done


def promote_by_hand(
    store: RequestStore, tracker: Tracker, change: Change, by: str, *, accepted: str = "", record: bytes | None = None
) -> ModelVersion:
    """Make a version the champion whose whole ledger was verified; what it removes and waits becomes removed.

    accepted: what the person has accepted, in words, for the audit trail. record: the key to seal ledger and evidence
    with if they are newer than the registry's. Raises OvertakenError.
    """
    after = change.after
    with _replacing(store, tracker, change, "promotion", change.said("promotion", by) + accepted):
        if record is not None:
            record_verification(tracker, after.version, after.evidence, after.ledger, record)
        done = promote(tracker, after.version, accepted=accepted and change.said("promotion", by) + accepted)
        _resurface(store, change, by)
        _take_over(store, change, by)
    return done


@contextmanager
def _replacing(store: RequestStore, tracker: Tracker, change: Change, event: Event, said: str) -> Iterator[None]:
    """Hold the model's promotion lock; go on only if the champion is the one that was weighed, or the new one.

    What was said goes into the audit trail before, and a notice into the outbox that holds once the block has ended.
    """
    version = change.after.version
    with lease(store, promotion_lock(version.name), wait=True) as held:
        now, expected = champion(tracker, version.name), change.before
        if now != expected and (now is None or now.uri != version.uri):
            was, instead = (found.uri if found else "none" for found in (expected, now))
            raise OvertakenError(
                f"the champion of {version.name} was {was}, and is {instead} by now",
                hint="see what has changed with `expunge ledger`, then repeat",
            )
        settle_unconfirmed(store, tracker, version.name)
        notice = Notice(event, version.name, version.version, now.version if now else None, change.resurfacing)
        is_new = now is None or now.uri != version.uri  # else it finishes what was killed, and was told before
        number = store.note(change.concerned, said, notice if is_new else None)
        held.check()
        yield
        if number is not None:
            store.confirm(number)


def _resurface(store: RequestStore, change: Change, by: str) -> None:
    """Put what the new champion does not remove back into the queue; it counts as no attempt."""
    why = f"resurfaced: {change.after.version.uri}, which {by} made the champion, does not remove it"
    for request in _in_state(store, change.resurfacing, (RequestState.REMOVED,)):
        store.transition(request, RequestState.ACCEPTED, detail=why, attempt=False)


def _take_over(store: RequestStore, change: Change, by: str) -> None:
    """Call removed what waited and is verified on the new champion, through a batch of its own."""
    waiting = _in_state(store, change.waiting, WAITING)
    if not waiting:
        return
    why = f"removed by {change.after.version.uri}, which {by} has promoted"
    for request in _in_state(store, waiting, (RequestState.FAILED,)):
        store.transition(request, RequestState.ACCEPTED, detail=why, attempt=False)
    name = f"promotion-{datetime.now(UTC):%Y%m%d}-{secrets.token_hex(3)}"
    batch = store.drain(name, [change.after.version.name], only=waiting)
    for request in batch.requests:
        mine = next(each for each in change.after.evidence.requests if each.request == request.id)
        evidence = {**kept_evidence(change.after.evidence, mine), "version": change.after.version.uri}
        store.transition(request.id, RequestState.REMOVED, detail=why, evidence=evidence, batch=batch.id)
    if batch.requests:
        store.close_batch(batch.id)


def _in_state(store: RequestStore, requests: Sequence[str], states: Sequence[RequestState]) -> list[str]:
    """Return those of the requests that are in one of these states; a ledger may name what the store has lost."""
    found = []
    for request in requests:
        try:
            state = store.get(request).state
        except NotFoundError:
            continue
        if state in states:
            found.append(request)
    return found
