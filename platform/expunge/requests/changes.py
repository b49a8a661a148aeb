"""The changes that the request store makes, each on an open transaction, with its lines in the audit trail."""

import json
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from itertools import islice

from pydantic import JsonValue
from sqlalchemy import Connection, func, insert, select, update

from expunge.errors import TransitionError
from expunge.requests import lifecycle, queries
from expunge.requests.tables import batch_requests, batches, events, requests
from expunge.types import RemovalBatch, RemovalRequest, RequestState

Choose = Callable[[Iterator[RemovalRequest]], Iterator[RemovalRequest]]
"""Yields, of requests that wait, those that a batch takes."""


def accept(connection: Connection, request: RemovalRequest) -> None:
    """Puts a new request into the queue. Raises IntegrityError where its id or its external id is taken."""
    at = now()
    values = {
        **{name: getattr(request, name) for name in ("id", "model", "external_id", "priority", "due")},
        "state": RequestState.ACCEPTED,
        "attempts": 0,
        "accepted_at": at,
        "body": request.model_dump_json(),
    }
    connection.execute(insert(requests), values)
    _record(connection, [request.id], None, RequestState.ACCEPTED, at)


def drain(
    connection: Connection,
    batch_id: str | None,
    models: Sequence[str] | None,
    limit: int | None,
    skip: Collection[str],
    only: Collection[str] | None,
    choose: Choose | None = None,
) -> RemovalBatch:
    """Moves what waits into a batch, or returns the batch that is to be continued; see `RequestStore.drain`."""
    name = batch_id if batch_id is not None else queries.oldest_open(connection, models, skip, only)
    exists = name is not None and queries.has_batch(connection, name)
    if name is not None and exists:
        known = queries.batch_record(connection, name)
        if known.requests:
            return RemovalBatch(id=known.id, created=known.created, requests=queries.bodies(connection, known.id))
    at = now()
    with closing(queries.queue(connection, models, only)) as waiting:
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
    _append(connection, batch.id, [request.id for request in batch.requests], at=at)
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


def resurface(connection: Connection, batch_id: str, request_ids: Sequence[str], why: str) -> None:
    """Takes removed requests into a batch again. Raises NotFoundError, and TransitionError where one is not removed."""
    for request_id in request_ids:
        here = queries.record(connection, request_id).state
        if here is not RequestState.REMOVED:
            raise TransitionError(f"request {request_id} is {here}, not removed", hint="leave it where it is")
    _move(connection, request_ids, RequestState.REMOVED, RequestState.ACCEPTED, detail=why)
    if not queries.has_batch(connection, batch_id):
        connection.execute(insert(batches), {"id": batch_id, "created": now()})
    _append(connection, batch_id, request_ids, at=now())


def transition(
    connection: Connection,
    request_id: str,
    to: RequestState,
    *,
    detail: str,
    evidence: dict[str, JsonValue] | None,
    batch: str | None,
    attempt: bool,
) -> None:
    """Moves one request along its lifecycle; see `RequestStore.transition`."""
    mine = requests.c.id == request_id
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
    counts = attempt and lifecycle.is_attempt(here, to)
    values: dict[str, object] = {"state": to, "attempts": row.attempts + counts}
    if evidence is not None:
        values["evidence"] = json.dumps(evidence)
    connection.execute(update(requests).where(mine).values(values))
    _record(connection, [request_id], here, to, now(), batch=row.batch, detail=detail)


def release(connection: Connection, batch: str, why: str) -> None:
    """Closes a batch; requests that it has not decided go back to the queue."""
    waiting = queries.undecided(connection, batch)
    if waiting:
        _move(connection, waiting, RequestState.BATCHED, RequestState.ACCEPTED, batch=batch, detail=why)
    connection.execute(update(batches).where(batches.c.id == batch).values(closed=now()))


def note(connection: Connection, request_ids: Sequence[str], detail: str) -> None:
    """Adds a line about each request to the audit trail, and leaves its state; unknown ids are left out."""
    at = now()
    for start in range(0, len(request_ids), queries.IDS_PER_STATEMENT):
        some = request_ids[start : start + queries.IDS_PER_STATEMENT]
        rows = connection.execute(select(requests.c.id, requests.c.state).where(requests.c.id.in_(some))).all()
        for state in {row.state for row in rows}:
            _record(connection, [row.id for row in rows if row.state is state], state, state, at, detail=detail)


def now() -> datetime:
    return datetime.now(UTC)


def _append(connection: Connection, batch: str, ids: Sequence[str], *, at: datetime) -> None:
    """Puts accepted requests at the end of a batch."""
    mine = batch_requests.c.batch == batch
    first = connection.execute(select(func.count()).select_from(batch_requests).where(mine)).scalar_one()
    rows = [{"batch": batch, "position": first + i, "request": id} for i, id in enumerate(ids)]
    connection.execute(insert(batch_requests), rows)
    _move(connection, ids, RequestState.ACCEPTED, RequestState.BATCHED, batch=batch, at=at)


def _move(
    connection: Connection,
    ids: Sequence[str],
    previous: RequestState,
    state: RequestState,
    *,
    batch: str | None = None,
    at: datetime | None = None,
    detail: str = "",
) -> None:
    """One step of many requests, each with its line in the audit trail."""
    values: dict[str, object] = {"state": state} if batch is None else {"state": state, "batch": batch}
    for start in range(0, len(ids), queries.IDS_PER_STATEMENT):
        some = ids[start : start + queries.IDS_PER_STATEMENT]
        connection.execute(update(requests).where(requests.c.id.in_(some)).values(values))
    _record(connection, ids, previous, state, at or now(), batch=batch, detail=detail)


def _record(
    connection: Connection,
    ids: Sequence[str],
    previous: RequestState | None,
    state: RequestState,
    at: datetime,
    batch: str | None = None,
    detail: str = "",
) -> None:
    """Adds a line about each request to the audit trail."""
    fixed = {"at": at, "previous": previous, "state": state, "batch": batch, "detail": detail}
    connection.execute(insert(events), [{"request": id, **fixed} for id in ids])
