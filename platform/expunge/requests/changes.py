"""The changes that the request store makes, each in one transaction with its events in the audit log."""

import json
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from itertools import islice

from pydantic import JsonValue
from sqlalchemy import Connection, delete, func, insert, select, update

from expunge.errors import TransitionError
from expunge.requests import lifecycle, queries
from expunge.requests.audit import Reason, Trail
from expunge.requests.tables import batch_requests, batches, request_blobs, requests
from expunge.types import DEFAULT_TENANT, RemovalBatch, RemovalRequest, RequestState

Choose = Callable[[Iterator[RemovalRequest]], Iterator[RemovalRequest]]
"""Yields, of requests that wait, those that a batch takes."""


def accept(trail: Trail, request: RemovalRequest, *, tenant: str = DEFAULT_TENANT, due_days: int = 0) -> None:
    """Puts a new request into the queue; without a due date of its own, it is due in `due_days`, if that is not 0.

    Raises IntegrityError where its id or its external id is taken.
    """
    at, envelope = now(), trail.vault.new(request.id)
    values = {
        **{name: getattr(request, name) for name in ("id", "model", "priority")},
        "due": request.due or (at.date() + timedelta(days=due_days) if due_days else None),
        "tenant": tenant,
        "external_id": trail.vault.external_id(request.model, request.external_id, tenant),
        "data_key": envelope.wrapped,
        "state": RequestState.ACCEPTED,
        "attempts": 0,
        "accepted_at": at,
        "body": envelope.close("body", request.model_dump_json()),
    }
    trail.connection.execute(insert(requests), values)
    rows = [{"blob": trail.vault.blob(blob), "request": request.id} for blob in {*request.blobs}]
    trail.connection.execute(insert(request_blobs), rows)
    trail.append([request.id], None, RequestState.ACCEPTED, at, reason="submitted")


def drain(
    trail: Trail,
    batch_id: str | None,
    models: Sequence[str] | None,
    limit: int | None,
    skip: Collection[str],
    only: Collection[str] | None,
    choose: Choose | None = None,
) -> RemovalBatch:
    """Moves what waits into a batch, or returns the batch that is to be continued; see `RequestStore.drain`."""
    connection, vault = trail.connection, trail.vault
    name = batch_id if batch_id is not None else queries.oldest_open(connection, models, skip, only)
    exists = name is not None and queries.has_batch(connection, name)
    if name is not None and exists:
        known = queries.batch_record(connection, name)
        if known.requests:
            return RemovalBatch(
                id=known.id, created=known.created, requests=queries.bodies(connection, known.id, vault)
            )
    at = now()
    with closing(queries.queue(connection, vault, models, only)) as waiting:
        chosen = tuple(islice(waiting if choose is None else choose(waiting), limit))
    batch = RemovalBatch(
        id=name or f"night-{at:%Y%m%d}-{secrets.token_hex(3)}",
        created=at,
        requests=chosen,
    )
    if not batch.requests:
        return batch
    if exists:  # an earlier version kept empty batches
        again = {"created": batch.created, "closed": None}
        connection.execute(update(batches).where(batches.c.id == name).values(again))
    else:
        connection.execute(insert(batches), {"id": batch.id, "created": batch.created})
    _append(trail, batch.id, [request.id for request in batch.requests], at=at)
    return batch


def start_batch(connection: Connection, batch_id: str, advance: int) -> int:
    """Counts one more driver of a batch; returns how many began since `advance` last grew. Raises NotFoundError."""
    here = batches.c.id == batch_id
    row = connection.execute(select(batches.c.starts, batches.c.advance).where(here)).one_or_none()
    if row is None:
        raise queries.no_batch(batch_id)
    starts = 1 if advance > row.advance else row.starts + 1
    connection.execute(update(batches).where(here).values(starts=starts, advance=advance))
    return starts


def resurface(trail: Trail, batch_id: str, request_ids: Sequence[str], why: str) -> None:
    """Takes removed requests into a batch again. Raises NotFoundError, and TransitionError where one is not removed."""
    connection = trail.connection
    for request_id in request_ids:
        here = queries.record(connection, request_id, trail.vault).state
        if here is not RequestState.REMOVED:
            raise TransitionError(f"request {request_id} is {here}, not removed", hint="leave it where it is")
    _move(trail, request_ids, RequestState.REMOVED, RequestState.ACCEPTED, reason="resurfaced", detail=why)
    if not queries.has_batch(connection, batch_id):
        connection.execute(insert(batches), {"id": batch_id, "created": now()})
    _append(trail, batch_id, request_ids, at=now())


def transition(
    trail: Trail,
    request_id: str,
    to: RequestState,
    *,
    reason: Reason,
    detail: str,
    evidence: dict[str, JsonValue] | None,
    batch: str | None,
    attempt: bool,
) -> None:
    """Moves one request along its lifecycle; see `RequestStore.transition`."""
    connection, mine = trail.connection, requests.c.id == request_id
    row = connection.execute(select(requests).where(mine).with_for_update()).one_or_none()
    if row is None:
        raise queries.unknown(request_id)
    if batch is not None and row.batch != batch:
        raise TransitionError(
            f"request {request_id} is in batch {row.batch}, not in {batch}", hint="a later night has it: leave it"
        )
    here: RequestState = row.state
    if here is to:
        return
    lifecycle.check(request_id, here, to)
    if to is RequestState.PURGED:
        raise TransitionError(f"request {request_id} is only purged with its pictures", hint="run `expunge purge`")
    counts = attempt and lifecycle.is_attempt(here, to)
    values: dict[str, object] = {"state": to, "attempts": row.attempts + counts}
    if evidence is not None:
        envelope = trail.vault.envelope(request_id, row.data_key or "")
        values["evidence"] = envelope.close("evidence", json.dumps(evidence))
    connection.execute(update(requests).where(mine).values(values))
    _record(trail, [request_id], here, to, now(), reason=reason, batch=row.batch, detail=detail)


def purge(trail: Trail, request_id: str, certificate: str) -> None:
    """Destroys a request's data key, and leaves digests in its row. Raises NotFoundError, TransitionError.

    What the old key sealed stays in the audit log, where it is noise. The certificate is sealed with a new key.
    """
    connection, vault, mine = trail.connection, trail.vault, requests.c.id == request_id
    row = connection.execute(select(requests).where(mine).with_for_update()).one_or_none()
    if row is None:
        raise queries.unknown(request_id)
    lifecycle.check(request_id, row.state, RequestState.PURGED)
    request, envelope = queries.request_of(vault, row), vault.new(request_id)
    values = {
        "state": RequestState.PURGED,
        "data_key": envelope.wrapped,
        "body": envelope.close("body", vault.tombstone(request).model_dump_json()),
        "evidence": None,
    }
    connection.execute(update(requests).where(mine).values(values))
    connection.execute(delete(request_blobs).where(request_blobs.c.request == request_id))
    details = {request_id: envelope.close("detail", certificate)}
    states = row.state, RequestState.PURGED
    trail.append([request_id], *states, now(), reason="purged", batch=row.batch, details=details)


def release(trail: Trail, batch: str, why: str) -> None:
    """Closes a batch; requests that it has not decided go back to the queue."""
    waiting = queries.undecided(trail.connection, batch)
    if waiting:
        states = RequestState.BATCHED, RequestState.ACCEPTED
        _move(trail, waiting, *states, reason="released", batch=batch, detail=why)
    trail.connection.execute(update(batches).where(batches.c.id == batch).values(closed=now()))


def note(trail: Trail, request_ids: Sequence[str], detail: str) -> None:
    """Adds a line about each request to the audit trail, and leaves its state; unknown ids are left out."""
    at = now()
    for start in range(0, len(request_ids), queries.IDS_PER_STATEMENT):
        some = request_ids[start : start + queries.IDS_PER_STATEMENT]
        query = select(requests.c.id, requests.c.state).where(requests.c.id.in_(some))
        rows = trail.connection.execute(query).all()
        for state in {row.state for row in rows}:
            ids = [row.id for row in rows if row.state is state]
            _record(trail, ids, state, state, at, reason="noted", detail=detail)


def now() -> datetime:
    return datetime.now(UTC)


def _append(trail: Trail, batch: str, ids: Sequence[str], *, at: datetime) -> None:
    """Puts accepted requests at the end of a batch."""
    connection, mine = trail.connection, batch_requests.c.batch == batch
    first = connection.execute(select(func.count()).select_from(batch_requests).where(mine)).scalar_one()
    rows = [{"batch": batch, "position": first + i, "request": id} for i, id in enumerate(ids)]
    connection.execute(insert(batch_requests), rows)
    _move(trail, ids, RequestState.ACCEPTED, RequestState.BATCHED, reason="drained", batch=batch, at=at)


def _move(
    trail: Trail,
    ids: Sequence[str],
    previous: RequestState,
    state: RequestState,
    *,
    reason: Reason,
    batch: str | None = None,
    at: datetime | None = None,
    detail: str = "",
) -> None:
    """One step of many requests, each with its event."""
    values: dict[str, object] = {"state": state} if batch is None else {"state": state, "batch": batch}
    for start in range(0, len(ids), queries.IDS_PER_STATEMENT):
        some = ids[start : start + queries.IDS_PER_STATEMENT]
        trail.connection.execute(update(requests).where(requests.c.id.in_(some)).values(values))
    _record(trail, ids, previous, state, at or now(), reason=reason, batch=batch, detail=detail)


def _record(
    trail: Trail,
    ids: Sequence[str],
    previous: RequestState,
    state: RequestState,
    at: datetime,
    *,
    reason: Reason,
    batch: str | None = None,
    detail: str = "",
) -> None:
    """Adds an event per request, with the detail sealed for each."""
    for start in range(0, len(ids), queries.IDS_PER_STATEMENT):
        some = ids[start : start + queries.IDS_PER_STATEMENT]
        found = queries.envelopes(trail.connection, trail.vault, some) if detail else {}
        details = {id: envelope.close("detail", detail) for id, envelope in found.items()}
        trail.append(some, previous, state, at, reason=reason, batch=batch, details=details)
