"""The reads of the request store, each on an open transaction."""

import json
from collections import defaultdict
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime

from sqlalchemy import Column, Connection, Date, Row, Select, Table, exists, func, literal, select, tuple_

from expunge.errors import NotFoundError
from expunge.requests.columns import UtcDateTime
from expunge.requests.records import BatchRecord, RequestEvent, RequestRecord
from expunge.requests.tables import batch_requests, batches, events, requests
from expunge.requests.vault import Envelope, Vault
from expunge.types import RemovalRequest, RequestState

IDS_PER_STATEMENT = 500
"""SQLite takes 32,766 variables, PostgreSQL's driver 65,535."""
SEALED = (requests.c.id, requests.c.data_key, requests.c.body)
"""The columns that `request_of` reads."""


@dataclass(frozen=True)
class Waiting:
    """Requests of one model in one state: how many, when the oldest was accepted, and the nearest due date."""

    requests: int
    oldest: datetime
    due: date | None


Backlog = dict[tuple[str, RequestState], Waiting]
"""Counts of waiting requests, by model and state."""


@dataclass(frozen=True)
class Wanted:
    """Which requests to list. `batch` finds every request that was ever in it, also those that have left it."""

    model: str | None = None
    state: RequestState | None = None
    batch: str | None = None
    tenant: str | None = None
    due_by: date | None = None

    def among(self, query: Select) -> Select:
        if self.model is not None:
            query = query.where(requests.c.model == self.model)
        if self.state is not None:
            query = query.where(requests.c.state == self.state)
        if self.tenant is not None:
            query = query.where(requests.c.tenant == self.tenant)
        if self.due_by is not None:
            query = query.where(requests.c.due <= self.due_by)
        if self.batch is not None:
            members = select(batch_requests.c.request).where(batch_requests.c.batch == self.batch)
            query = query.where(requests.c.id.in_(members))
        return query


def page(
    connection: Connection,
    columns: Table | Column,
    wanted: Wanted,
    after: str | None,
    limit: int | None,
    *,
    by_due: bool = False,
) -> Select:
    """Selects the oldest first, or what is due soonest, from the request after `after`. Raises NotFoundError."""
    due = [func.coalesce(requests.c.due, literal(date.max, Date))] if by_due else []
    order = (*due, requests.c.accepted_at, requests.c.id)
    query = wanted.among(select(columns)).order_by(*order).limit(limit)
    if after is None:
        return query
    there = Wanted(tenant=wanted.tenant).among(select(requests.c.due, requests.c.accepted_at))
    row = connection.execute(there.where(requests.c.id == after)).one_or_none()
    if row is None:
        raise unknown(after)
    last_due = [literal(row.due or date.max, Date)] if by_due else []
    return query.where(tuple_(*order) > tuple_(*last_due, literal(row.accepted_at, UtcDateTime), literal(after)))


def records(connection: Connection, query: Select, vault: Vault, *, history: bool = True) -> list[RequestRecord]:
    """The records of a query over `requests`, in its order; without `history`, it is not read and left empty.

    Raises StorageError if a row does not open.
    """
    rows = connection.execute(query).all()
    envelopes = {row.id: vault.envelope(row.id, row.data_key or "") for row in rows}
    histories = _histories(connection, envelopes) if history else {}
    return [
        RequestRecord(
            request=RemovalRequest.model_validate_json(envelopes[row.id].open("body", row.body)),
            state=row.state,
            batch=row.batch,
            attempts=row.attempts,
            accepted_at=row.accepted_at,
            tenant=row.tenant,
            due=row.due,
            evidence=None if row.evidence is None else json.loads(envelopes[row.id].open("evidence", row.evidence)),
            history=tuple(histories.get(row.id, ())),
        )
        for row in rows
    ]


def _histories(connection: Connection, envelopes: Mapping[str, Envelope]) -> dict[str, list[RequestEvent]]:
    found: dict[str, list[RequestEvent]] = defaultdict(list)
    ids = list(envelopes)
    for start in range(0, len(ids), IDS_PER_STATEMENT):
        mine = events.c.request.in_(ids[start : start + IDS_PER_STATEMENT])
        for row in connection.execute(select(events).where(mine).order_by(events.c.id)):
            names = ("at", "previous", "state", "batch", "actor", "reason", "release")
            # A purge destroys the key that earlier details were sealed with.
            detail = envelopes[row.request].opened("detail", row.detail) if row.detail else ""
            event = RequestEvent(detail=detail or "", **{name: getattr(row, name) for name in names})
            found[row.request].append(event)
    return found


def envelopes(connection: Connection, vault: Vault, ids: Sequence[str]) -> dict[str, Envelope]:
    """Unwraps the data keys of these requests; unknown ids are left out. Raises StorageError if one does not open."""
    query = select(requests.c.id, requests.c.data_key).where(requests.c.id.in_(ids))
    return {row.id: vault.envelope(row.id, row.data_key or "") for row in connection.execute(query)}


def request_of(vault: Vault, row: Row) -> RemovalRequest:
    """The request in a row of `id`, `data_key` and `body`. Raises StorageError if it does not open."""
    body = vault.envelope(row.id, row.data_key or "").open("body", row.body)
    return RemovalRequest.model_validate_json(body)


def record(connection: Connection, request_id: str, vault: Vault) -> RequestRecord:
    """Raises NotFoundError."""
    found = records(connection, select(requests).where(requests.c.id == request_id), vault)
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


def bodies(connection: Connection, batch_id: str, vault: Vault) -> tuple[RemovalRequest, ...]:
    """Returns the requests of a batch, in the order in which they were drained."""
    joined = select(*SEALED).join(batch_requests, batch_requests.c.request == requests.c.id)
    mine = joined.where(batch_requests.c.batch == batch_id).order_by(batch_requests.c.position)
    return tuple(request_of(vault, row) for row in connection.execute(mine))


def oldest_open(
    connection: Connection, models: Sequence[str] | None, skip: Collection[str], only: Collection[str] | None = None
) -> str | None:
    """The oldest batch that is not closed and holds requests; with `models`, one that holds no other model's.

    With `only`, one that has at least one of these requests still to decide.
    """
    mine = batch_requests.c.batch == batches.c.id
    query = (
        select(batches.c.id)
        .where(batches.c.closed.is_(None), batches.c.id.not_in(skip), exists().where(mine))
        .order_by(batches.c.created, batches.c.id)
    )
    if models is not None:
        other = mine & requests.c.model.not_in(models)
        foreign = (
            select(batch_requests.c.request).join(requests, requests.c.id == batch_requests.c.request).where(other)
        )
        query = query.where(~exists(foreign))
    if only is None:
        return connection.execute(query.limit(1)).scalar()
    candidates = connection.execute(query).scalars().all()
    return next((batch for batch in candidates if not {*only}.isdisjoint(undecided(connection, batch))), None)


def undecided(connection: Connection, batch_id: str) -> list[str]:
    """Returns the ids of the batch's requests that are not decided yet."""
    mine = (requests.c.batch == batch_id) & (requests.c.state == RequestState.BATCHED)
    return list(connection.execute(select(requests.c.id).where(mine).order_by(requests.c.id)).scalars())


def queue(
    connection: Connection, vault: Vault, models: Sequence[str] | None, only: Collection[str] | None = None
) -> Generator[RemovalRequest, None, None]:
    """Yields what waits: highest priority first, then nearest due date, then arrival; locked by the transaction.

    Only a few hundred are held at a time. With `only`, yields no other requests; they may be more than a statement
    takes, and so are picked out here.
    """
    query = _in_turn(select(*SEALED), models).with_for_update()
    mine = None if only is None else {*only}
    with connection.execute(query.execution_options(yield_per=IDS_PER_STATEMENT)) as rows:
        for row in rows:
            if mine is None or row.id in mine:
                yield request_of(vault, row)


@dataclass(frozen=True)
class Expected:
    """A request that waits, as far as its turn depends on it."""

    id: str
    model: str
    due: date | None


def expected(connection: Connection, models: Sequence[str] | None) -> Iterator[Expected]:
    """Yields what waits in the order of `queue`, without its content; only a few hundred are held at a time."""
    query = _in_turn(select(requests.c.id, requests.c.model, requests.c.due), models)
    with connection.execute(query.execution_options(yield_per=IDS_PER_STATEMENT)) as rows:
        for row in rows:
            yield Expected(row.id, row.model, row.due)


def _in_turn(query: Select, models: Sequence[str] | None) -> Select:
    order = (requests.c.priority.desc(), requests.c.due.asc().nulls_last(), requests.c.accepted_at, requests.c.id)
    query = query.where(requests.c.state == RequestState.ACCEPTED).order_by(*order)
    return query if models is None else query.where(requests.c.model.in_(models))


def backlog(connection: Connection, states: Collection[RequestState]) -> Backlog:
    """Counts what waits, for each model and each of these states."""
    model, state = requests.c.model, requests.c.state
    figures = (func.count(), func.min(requests.c.accepted_at), func.min(requests.c.due))
    query = select(model, state, *figures).where(state.in_(states)).group_by(model, state)
    rows = connection.execute(query)
    return {(name, where): Waiting(count, oldest, due) for name, where, count, oldest, due in rows}


def ids_by_model(connection: Connection, state: RequestState, models: Sequence[str] | None) -> dict[str, list[str]]:
    """The ids of the requests in `state` by model, oldest first; with `models`, of those only."""
    query = select(requests.c.model, requests.c.id).where(requests.c.state == state)
    if models is not None:
        query = query.where(requests.c.model.in_(models))
    found: dict[str, list[str]] = {}
    for row in connection.execute(query.order_by(requests.c.model, requests.c.accepted_at, requests.c.id)):
        found.setdefault(row.model, []).append(row.id)
    return found


def unmoved(connection: Connection, state: RequestState, before: datetime) -> list[str]:
    """Returns the ids of the requests that came into `state` before this time and have stayed in it, oldest first."""
    came = func.max(events.c.at)
    moved = events.c.previous.is_(None) | (events.c.previous != events.c.state)  # the others are notes
    query = (
        select(requests.c.id)
        .join(events, events.c.request == requests.c.id)
        .where(requests.c.state == state, moved)
        .group_by(requests.c.id)
        .having(came <= literal(before, UtcDateTime))
        .order_by(came, requests.c.id)
    )
    return list(connection.execute(query).scalars())


def open_batches(connection: Connection, models: Sequence[str] | None) -> dict[str, int]:
    """How many undecided requests each batch holds; with `models`, only requests of those count."""
    query = select(requests.c.batch, func.count()).where(requests.c.state == RequestState.BATCHED)
    if models is not None:
        query = query.where(requests.c.model.in_(models))
    rows = connection.execute(query.group_by(requests.c.batch).order_by(requests.c.batch)).all()
    return {batch: count for batch, count in rows}
