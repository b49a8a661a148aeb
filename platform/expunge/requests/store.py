"""The durable queue: accepted once, drained into batches, never lost, every step in the audit trail."""

import json
import secrets
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, date, datetime

from pydantic import JsonValue, TypeAdapter, ValidationError
from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from expunge.errors import InputError, StorageError, TransitionError
from expunge.requests import lifecycle, queries
from expunge.requests.database import Database
from expunge.requests.home import recall, remember
from expunge.requests.schema import BatchRecord, RequestRecord, batch_requests, batches, events, identity, requests
from expunge.settings import Settings
from expunge.words import BlobId, Identifier, RemovalBatch, RemovalRequest, RequestState

Records = list[RequestRecord]
Batches = list[BatchRecord]
Ids = list[str]

MAX_STARTS = 3
"""Drivers that may begin on a batch without getting any further, before it is given up."""

_IDENTIFIER: TypeAdapter[str] = TypeAdapter(Identifier)
_BLOB_ID: TypeAdapter[str] = TypeAdapter(BlobId)


@dataclass(frozen=True)
class Waiting:
    """Requests of one model in one state: how many, when the oldest was accepted, and the nearest due date."""

    requests: int
    oldest: datetime
    due: date | None


Backlog = dict[tuple[str, RequestState], Waiting]


class RequestStore:
    """Every method is atomic, and raises UnavailableError or StorageError when the database does not serve."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def close(self) -> None:
        self._database.close()

    def read(self) -> AbstractContextManager[Connection]:
        """A transaction for what is asked of all rows at once."""
        return self._database.read()

    def add(self, request: RemovalRequest) -> tuple[RequestRecord, bool]:
        """Accepts a request; False says that its (model, external_id) was known, and that the known one is returned.

        Raises InputError if the known one has other content.
        """
        now = _now()
        values = {
            **{name: getattr(request, name) for name in ("id", "model", "external_id", "priority", "due")},
            "state": RequestState.ACCEPTED,
            "attempts": 0,
            "accepted_at": now,
            "body": request.model_dump_json(),
        }
        known = self.find(request.model, request.external_id)
        if known is None:
            try:
                with self._database.write() as connection:
                    connection.execute(insert(requests), values)
                    _record(connection, [request.id], None, RequestState.ACCEPTED, now)
                return self.get(request.id), True
            except IntegrityError:  # another process accepted it in between
                known = self.find(request.model, request.external_id)
        if known is None:
            raise StorageError(f"request id {request.id} is taken", hint="submit it again")
        check_same(known.request, request)
        return known, False

    def get(self, request_id: str) -> RequestRecord:
        """Raises NotFoundError."""
        with self._database.read() as connection:
            return queries.record(connection, request_id)

    def find(self, model: str, external_id: str) -> RequestRecord | None:
        with self._database.read() as connection:
            where = (requests.c.model == model) & (requests.c.external_id == external_id)
            return next(iter(queries.records(connection, select(requests).where(where))), None)

    def list(
        self,
        model: str | None = None,
        state: RequestState | None = None,
        batch: str | None = None,
        limit: int | None = None,
        after: str | None = None,
        *,
        history: bool = True,
    ) -> Records:
        """Oldest first, from the request that follows `after`; without `history`, that of each is empty.

        `batch` finds every request that ever was in it, also those that went back to the queue. Raises NotFoundError
        where there is no request `after`.
        """
        wanted = queries.Wanted(model, state, batch)
        with self._database.read() as connection:
            query = queries.page(connection, requests, wanted, after, limit)
            return queries.records(connection, query, history=history)

    def each(
        self,
        model: str | None = None,
        state: RequestState | None = None,
        batch: str | None = None,
        limit: int | None = None,
        after: str | None = None,
    ) -> Iterator[RequestRecord]:
        """What `list` gives, one by one: as long as it may be, a few hundred records are held at a time."""
        with self._database.read() as connection:
            query = queries.page(connection, requests.c.id, queries.Wanted(model, state, batch), after, limit)
            ids = connection.execute(query).scalars().all()
        for start in range(0, len(ids), queries.IDS_A_STATEMENT):
            some = ids[start : start + queries.IDS_A_STATEMENT]
            with self._database.read() as connection:
                found = queries.records(connection, select(requests).where(requests.c.id.in_(some)))
            records = {record.request.id: record for record in found}
            yield from (records[id] for id in some)

    def total(self, model: str | None = None, state: RequestState | None = None, batch: str | None = None) -> int:
        """How many `list` would give without a limit."""
        query = queries.Wanted(model, state, batch).among(select(func.count()).select_from(requests))
        with self._database.read() as connection:
            return connection.execute(query).scalar_one()

    def backlog(self, states: Collection[RequestState]) -> Backlog:
        """What there is of each model in each of these states."""
        model, state = requests.c.model, requests.c.state
        figures = (func.count(), func.min(requests.c.accepted_at), func.min(requests.c.due))
        query = select(model, state, *figures).where(state.in_(states)).group_by(model, state)
        with self._database.read() as connection:
            rows = connection.execute(query)
            return {(name, where): Waiting(count, oldest, due) for name, where, count, oldest, due in rows}

    def identity(self) -> str:
        """The database's own id, made with it."""
        with self._database.read() as connection:
            return connection.execute(select(identity.c.value).where(identity.c.name == "database")).scalar_one()

    def count(self, state: RequestState, models: Sequence[str] | None = None) -> int:
        """How many requests are in `state`, of these models only where some are named."""
        query = select(func.count()).select_from(requests).where(requests.c.state == state)
        if models is not None:
            query = query.where(requests.c.model.in_(models))
        with self._database.read() as connection:
            return connection.execute(query).scalar_one()

    def ids(self, state: RequestState, models: Sequence[str] | None = None) -> dict[str, Ids]:
        """By model, the ids of the requests in `state`, oldest first."""
        query = select(requests.c.model, requests.c.id).where(requests.c.state == state)
        if models is not None:
            query = query.where(requests.c.model.in_(models))
        found: dict[str, Ids] = {}
        with self._database.read() as connection:
            for row in connection.execute(query.order_by(requests.c.model, requests.c.accepted_at, requests.c.id)):
                found.setdefault(row.model, []).append(row.id)
        return found

    def open_batches(self, models: Sequence[str] | None = None) -> dict[str, int]:
        """How many undecided requests each batch holds, of these models only where some are named."""
        query = select(requests.c.batch, func.count()).where(requests.c.state == RequestState.BATCHED)
        if models is not None:
            query = query.where(requests.c.model.in_(models))
        with self._database.read() as connection:
            rows = connection.execute(query.group_by(requests.c.batch).order_by(requests.c.batch)).all()
            return {batch: count for batch, count in rows}

    def drain(
        self,
        batch_id: str | None,
        models: Sequence[str] | None = None,
        limit: int | None = None,
        skip: Collection[str] = (),
        only: Collection[str] | None = None,
    ) -> RemovalBatch:
        """Moves accepted requests into a batch, by priority, due date and arrival: all of them, or the first `limit`.

        A `batch_id` that holds requests gives them again and drains nothing. Without one, the oldest open batch is
        continued (with `models`: of those models only; never one of `skip`), else `night-YYYYMMDD-xxxxxx` is made. If
        nothing waits, the batch returned is empty and not kept. With `only`, no other requests are drained, and an open
        batch is continued only where it has one of them to decide. Raises InputError for an id that is no identifier.
        """
        if batch_id is not None:
            _check(_IDENTIFIER, batch_id, "batch id", "use letters, digits, dot, dash and underscore, at most 63")
        try:
            return self._drain(batch_id, models, limit, skip, only)
        except IntegrityError:  # another process made the same batch in between: read it
            return self._drain(batch_id, models, limit, skip, only)

    def _drain(
        self,
        batch_id: str | None,
        models: Sequence[str] | None,
        limit: int | None,
        skip: Collection[str],
        only: Collection[str] | None,
    ) -> RemovalBatch:
        with self._database.write() as connection:
            name = batch_id if batch_id is not None else queries.oldest_open(connection, models, skip, only)
            exists = name is not None and queries.has_batch(connection, name)
            if name is not None and exists:
                known = queries.batch_record(connection, name)
                if known.requests:
                    bodies = queries.bodies(connection, known.id)
                    return RemovalBatch(id=known.id, created=known.created, requests=bodies)
            batch = RemovalBatch(
                id=name or f"night-{_now():%Y%m%d}-{secrets.token_hex(3)}",
                created=_now(),
                requests=tuple(queries.queue(connection, models, limit, only)),
            )
            if not batch.requests:
                return batch
            if exists:  # an earlier version kept empty batches
                again = {"created": batch.created, "closed": None}
                connection.execute(update(batches).where(batches.c.id == name).values(again))
            else:
                connection.execute(insert(batches), {"id": batch.id, "created": batch.created})
            _append(connection, batch.id, [request.id for request in batch.requests], at=batch.created)
            return batch

    def start_batch(self, batch_id: str, advance: int) -> int:
        """Counts one more driver that begins on a batch; returns how many there were since it last got any further.

        advance: a number that grows as the batch gets further. Raises NotFoundError.
        """
        with self._database.write() as connection:
            here = batches.c.id == batch_id
            row = connection.execute(select(batches.c.starts, batches.c.advance).where(here)).one_or_none()
            if row is None:
                raise queries.no_batch(batch_id)
            starts = 1 if advance > row.advance else row.starts + 1
            connection.execute(update(batches).where(here).values(starts=starts, advance=advance))
            return starts

    def has_ended(self, batch_id: str) -> bool:
        """Whether the batch is closed; one that does not exist is not."""
        with self._database.read() as connection:
            return connection.execute(select(batches.c.closed).where(batches.c.id == batch_id)).scalar() is not None

    def release_batch(self, batch_id: str, why: str) -> None:
        """Ends a batch that cannot be run: what it has not decided goes back to the queue, which is no attempt."""
        with self._database.write() as connection:
            _release(connection, batch_id, why)

    def resurface(self, batch_id: str, request_ids: Sequence[str], why: str) -> None:
        """Takes removed requests that no model holds any more into a batch, to be removed again; all or none.

        Raises NotFoundError, and TransitionError where one is not removed.
        """
        with self._database.write() as connection:
            for request_id in request_ids:
                here = queries.record(connection, request_id).state
                if here is not RequestState.REMOVED:
                    raise TransitionError(f"request {request_id} is {here}, not removed", hint="leave it where it is")
            _move(connection, request_ids, RequestState.REMOVED, RequestState.ACCEPTED, detail=why)
            if not queries.has_batch(connection, batch_id):
                connection.execute(insert(batches), {"id": batch_id, "created": _now()})
            _append(connection, batch_id, request_ids, at=_now())

    def transition(
        self,
        request_id: str,
        to: RequestState,
        *,
        detail: str = "",
        evidence: dict[str, JsonValue] | None = None,
        batch: str | None = None,
        attempt: bool = True,
    ) -> RequestRecord:
        """Moves a request along its lifecycle; to be where it is already is no step and changes nothing.

        With `batch`, the request must still be that batch's. A night that ends without a removal counts as an attempt
        unless `attempt` is false: the night failed, not the request. Raises NotFoundError, TransitionError naming both
        states.
        """
        with self._database.write() as connection:
            row = connection.execute(
                select(requests).where(requests.c.id == request_id).with_for_update()
            ).one_or_none()
            if row is None:
                raise queries.unknown(request_id)
            if batch is not None and row.batch != batch:
                raise TransitionError(
                    f"request {request_id} is in batch {row.batch}, not in {batch}",
                    hint="a later night has it: leave it",
                )
            here: RequestState = row.state
            if here is not to:
                lifecycle.check(request_id, here, to)
                counts = attempt and lifecycle.is_attempt(here, to)
                values: dict[str, object] = {"state": to, "attempts": row.attempts + counts}
                if evidence is not None:
                    values["evidence"] = json.dumps(evidence)
                connection.execute(update(requests).where(requests.c.id == request_id).values(values))
                _record(connection, [request_id], here, to, _now(), batch=row.batch, detail=detail)
            return queries.record(connection, request_id)

    def batch(self, batch_id: str) -> BatchRecord:
        """Raises NotFoundError."""
        with self._database.read() as connection:
            return queries.batch_record(connection, batch_id)

    def batches(self) -> Batches:
        """Oldest first."""
        with self._database.read() as connection:
            ids = connection.execute(select(batches.c.id).order_by(batches.c.created, batches.c.id)).scalars().all()
            return [queries.batch_record(connection, id) for id in ids]

    def set_report(self, batch_id: str, blob_id: str) -> None:
        """Names the sealed report of a batch; a later one takes its place. Raises NotFoundError, InputError."""
        _check(_BLOB_ID, blob_id, "report", "give the id that the blob store returned")
        with self._database.write() as connection:
            queries.batch_record(connection, batch_id)
            connection.execute(update(batches).where(batches.c.id == batch_id).values(report=blob_id))

    def close_batch(self, batch_id: str) -> None:
        """Ends a batch; again is no error. Raises TransitionError while a request in it is undecided, NotFoundError."""
        with self._database.write() as connection:
            if queries.batch_record(connection, batch_id).closed is not None:
                return
            count = len(queries.undecided(connection, batch_id))
            if count:
                raise TransitionError(
                    f"batch {batch_id} holds {count} undecided requests", hint="decide or requeue each, then close it"
                )
            connection.execute(update(batches).where(batches.c.id == batch_id).values(closed=_now()))


def open_store(settings: Settings, *, patience: float = 15.0) -> RequestStore:
    """Connects and brings the schema up to date; waits `patience` seconds for a lock or a server that is away.

    Raises InputError, UnavailableError, StorageError: also where the home remembers a database, and this one is new or
    another.
    """
    known = recall(settings)
    database = Database(settings.database, patience=patience)
    try:
        database.migrate(exists=known is not None and known.database is not None)
        store = RequestStore(database)
        remember(settings, database=store.identity())
    except BaseException:
        database.close()
        raise
    return store


def nothing_to_do(store: RequestStore, models: Sequence[str] | None) -> str:
    """Why a night has nothing to do, in one line that never hides what waits.

    Raises InputError where a request waits in an open batch that this night was not to continue: it was given another
    name, or models of which the batch does not only hold requests.
    """
    for batch, count in store.open_batches(models).items():
        which = f" of {', '.join(models)}" if models else ""
        held = f"{count} undecided request{'s' if count > 1 else ''}{which}"
        raise InputError(f"batch {batch} is open and holds {held}", hint=f"run `expunge night --batch {batch}`")
    waiting = store.count(RequestState.ACCEPTED)
    if not waiting:
        return "nothing to do: no request waits"
    which = f" of {', '.join(models)}" if models else ""
    return f"nothing to do: no request{which} waits; {waiting} others do"


def check_same(known: RemovalRequest, request: RemovalRequest) -> None:
    """Raises InputError naming the fields in which `request` differs from the known one of its external id."""
    differing = [
        name for name in RemovalRequest.model_fields if name != "id" and getattr(known, name) != getattr(request, name)
    ]
    if differing:
        message = f"external_id: {known.id} has it already, with another {', '.join(differing)}"
        raise InputError(message, hint="use a new external_id, or submit the same content")


def _now() -> datetime:
    return datetime.now(UTC)


def _append(connection: Connection, batch: str, ids: Sequence[str], *, at: datetime) -> None:
    """Puts accepted requests at the end of a batch."""
    mine = batch_requests.c.batch == batch
    first = connection.execute(select(func.count()).select_from(batch_requests).where(mine)).scalar_one()
    rows = [{"batch": batch, "position": first + i, "request": id} for i, id in enumerate(ids)]
    connection.execute(insert(batch_requests), rows)
    _move(connection, ids, RequestState.ACCEPTED, RequestState.BATCHED, batch=batch, at=at)


def _release(connection: Connection, batch: str, why: str) -> None:
    waiting = queries.undecided(connection, batch)
    if waiting:
        _move(connection, waiting, RequestState.BATCHED, RequestState.ACCEPTED, batch=batch, detail=why)
    connection.execute(update(batches).where(batches.c.id == batch).values(closed=_now()))


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
    for start in range(0, len(ids), queries.IDS_A_STATEMENT):
        some = ids[start : start + queries.IDS_A_STATEMENT]
        connection.execute(update(requests).where(requests.c.id.in_(some)).values(values))
    _record(connection, ids, previous, state, at or _now(), batch=batch, detail=detail)


def _check(adapter: TypeAdapter[str], value: str, what: str, hint: str) -> None:
    try:
        adapter.validate_python(value)
    except ValidationError:
        raise InputError(f"{what} {value!r} is malformed", hint=hint) from None


def _record(
    connection: Connection,
    ids: Sequence[str],
    previous: RequestState | None,
    state: RequestState,
    at: datetime,
    batch: str | None = None,
    detail: str = "",
) -> None:
    fixed = {"at": at, "previous": previous, "state": state, "batch": batch, "detail": detail}
    connection.execute(insert(events), [{"request": id, **fixed} for id in ids])
