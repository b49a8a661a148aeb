"""The reads of the request store, each on an open transaction."""

import json
from collections import defaultdict
from collections.abc import Collection, Sequence

from sqlalchemy import Connection, Select, exists, select

from expunge.errors import NotFoundError
from expunge.requests.schema import BatchRecord, RequestEvent, RequestRecord, batch_requests, batches, events, requests
from expunge.words import RemovalRequest, RequestState


def records(connection: Connection, query: Select) -> list[RequestRecord]:
    """The records of a query over `requests`, in its order; two statements, however many there are."""
    rows = connection.execute(query).all()
    history: dict[str, list[RequestEvent]] = defaultdict(list)
    ids = query.with_only_columns(requests.c.id).subquery()
    lines = select(events).where(events.c.request.in_(select(ids.c.id))).order_by(events.c.id)
    for line in connection.execute(lines):
        event = RequestEvent(at=line.at, previous=line.previous, state=line.state, batch=line.batch, detail=line.detail)
        history[line.request].append(event)
    return [
        RequestRecord(
            request=RemovalRequest.model_validate_json(row.body),
            state=row.state,
            batch=row.batch,
            attempts=row.attempts,
            accepted_at=row.accepted_at,
            evidence=None if row.evidence is None else json.loads(row.evidence),
            history=tuple(history[row.id]),
        )
        for row in rows
    ]


def record(connection: Connection, request_id: str) -> RequestRecord:
    """Raises NotFoundError."""
    found = records(connection, select(requests).where(requests.c.id == request_id))
    if not found:
        raise unknown(request_id)
    return found[0]


def unknown(request_id: str) -> NotFoundError:
    return NotFoundError(f"request {request_id!r} does not exist", hint="`expunge list` shows those that do")


def batch_record(connection: Connection, batch_id: str) -> BatchRecord:
    """Raises NotFoundError."""
    row = connection.execute(select(batches).where(batches.c.id == batch_id)).one_or_none()
    if row is None:
        raise no_batch(batch_id)
    mine = (
        select(batch_requests.c.request).where(batch_requests.c.batch == batch_id).order_by(batch_requests.c.position)
    )
    ids = connection.execute(mine).scalars().all()
    return BatchRecord(
        id=row.id, created=row.created, closed=row.closed, starts=row.starts, report=row.report, requests=tuple(ids)
    )


def no_batch(batch_id: str) -> NotFoundError:
    return NotFoundError(f"batch {batch_id!r} does not exist", hint="`expunge list` shows the batch of each request")


def has_batch(connection: Connection, batch_id: str) -> bool:
    return connection.execute(select(batches.c.id).where(batches.c.id == batch_id)).one_or_none() is not None


def bodies(connection: Connection, batch_id: str) -> tuple[RemovalRequest, ...]:
    """The requests of a batch, in the order in which they were drained."""
    joined = select(requests.c.body).join(batch_requests, batch_requests.c.request == requests.c.id)
    mine = joined.where(batch_requests.c.batch == batch_id).order_by(batch_requests.c.position)
    return tuple(RemovalRequest.model_validate_json(body) for body in connection.execute(mine).scalars())


def oldest_open(connection: Connection, models: Sequence[str] | None, skip: Collection[str]) -> str | None:
    """The oldest batch that is not closed and holds requests; with `models`, one that holds no other model's."""
    mine = batch_requests.c.batch == batches.c.id
    query = (
        select(batches.c.id)
        .where(batches.c.closed.is_(None), batches.c.id.not_in(skip), exists().where(mine))
        .order_by(batches.c.created, batches.c.id)
        .limit(1)
    )
    if models is not None:
        other = mine & requests.c.model.not_in(models)
        foreign = (
            select(batch_requests.c.request).join(requests, requests.c.id == batch_requests.c.request).where(other)
        )
        query = query.where(~exists(foreign))
    return connection.execute(query).scalar()


def undecided(connection: Connection, batch_id: str) -> list[str]:
    """The ids of a batch's requests that it has not decided yet."""
    mine = (requests.c.batch == batch_id) & (requests.c.state == RequestState.BATCHED)
    return list(connection.execute(select(requests.c.id).where(mine).order_by(requests.c.id)).scalars())


def queue(connection: Connection, models: Sequence[str] | None, limit: int | None) -> list[RemovalRequest]:
    """What waits: highest priority first, then nearest due date, then arrival; locked until the transaction ends."""
    order = (requests.c.priority.desc(), requests.c.due.asc().nulls_last(), requests.c.accepted_at, requests.c.id)
    query = (
        select(requests.c.body)
        .where(requests.c.state == RequestState.ACCEPTED)
        .order_by(*order)
        .limit(limit)
        .with_for_update()
    )
    if models is not None:
        query = query.where(requests.c.model.in_(models))
    return [RemovalRequest.model_validate_json(body) for body in connection.execute(query).scalars()]
