"""The durable queue: accepted once, drained into batches, never lost, every step in the audit trail."""

import json
import secrets
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime

from pydantic import JsonValue, TypeAdapter, ValidationError
from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from expunge.errors import InputError, StorageError, TransitionError
from expunge.requests import lifecycle, queries
from expunge.requests.database import Database
from expunge.requests.schema import BatchRecord, RequestRecord, batch_requests, batches, events, requests
from expunge.settings import Settings
from expunge.words import BlobId, Identifier, RemovalBatch, RemovalRequest, RequestState

Records = list[RequestRecord]
Batches = list[BatchRecord]

_IDENTIFIER: TypeAdapter[str] = TypeAdapter(Identifier)
_BLOB_ID: TypeAdapter[str] = TypeAdapter(BlobId)


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
    ) -> Records:
        """Oldest first. `batch` finds every request that ever was in it, also those that went back to the queue."""
        query = select(requests).order_by(requests.c.accepted_at, requests.c.id).limit(limit)
        if model is not None:
            query = query.where(requests.c.model == model)
        if state is not None:
            query = query.where(requests.c.state == state)
        if batch is not None:
            query = query.where(
                requests.c.id.in_(select(batch_requests.c.request).where(batch_requests.c.batch == batch))
            )
        with self._database.read() as connection:
            return queries.records(connection, query)

    def drain(
        self, batch_id: str | None, models: Sequence[str] | None = None, limit: int | None = None
    ) -> RemovalBatch:
        """Moves accepted requests into a batch, by priority, due date and arrival; all of them, or none.

        A `batch_id` that exists gives its requests again and drains nothing. Without one, the oldest open batch (with
        `models`: of those models only) is continued, else `night-YYYYMMDD-xxxxxx` is made. If nothing waits, an empty
        batch is returned, and kept only if the caller named it. Raises InputError for an id that is no identifier.
        """
        if batch_id is not None:
            _check(_IDENTIFIER, batch_id, "batch id", "use letters, digits, dot, dash and underscore, at most 63")
        try:
            return self._drain(batch_id, models, limit)
        except IntegrityError:  # another process made the same batch in between: read it
            return self._drain(batch_id, models, limit)

    def _drain(self, batch_id: str | None, models: Sequence[str] | None, limit: int | None) -> RemovalBatch:
        with self._database.write() as connection:
            name = batch_id if batch_id is not None else queries.oldest_open(connection, models)
            if name is not None and queries.has_batch(connection, name):
                known = queries.batch_record(connection, name)
                return RemovalBatch(id=known.id, created=known.created, requests=queries.bodies(connection, known.id))
            batch = RemovalBatch(
                id=name or f"night-{_now():%Y%m%d}-{secrets.token_hex(3)}",
                created=_now(),
                requests=tuple(queries.queue(connection, models, limit)),
            )
            if batch.requests or batch_id is not None:
                connection.execute(insert(batches), {"id": batch.id, "created": batch.created})
            if batch.requests:
                _fill(connection, batch)
            return batch

    def transition(
        self,
        request_id: str,
        to: RequestState,
        *,
        detail: str = "",
        evidence: dict[str, JsonValue] | None = None,
        batch: str | None = None,
    ) -> RequestRecord:
        """Moves a request along its lifecycle; to be where it is already is no step and changes nothing.

        With `batch`, the request must still be that batch's. Raises NotFoundError, TransitionError naming both states.
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
                values: dict[str, object] = {"state": to, "attempts": row.attempts + lifecycle.is_attempt(here, to)}
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
            undecided = (requests.c.batch == batch_id) & (requests.c.state == RequestState.BATCHED)
            count = connection.execute(select(func.count()).select_from(requests).where(undecided)).scalar_one()
            if count:
                raise TransitionError(
                    f"batch {batch_id} holds {count} undecided requests", hint="decide or requeue each, then close it"
                )
            connection.execute(update(batches).where(batches.c.id == batch_id).values(closed=_now()))


def open_store(settings: Settings) -> RequestStore:
    """Connects and brings the schema up to date. Raises InputError, UnavailableError, StorageError."""
    database = Database(settings.database)
    database.migrate()
    return RequestStore(database)


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


def _fill(connection: Connection, batch: RemovalBatch) -> None:
    ids = [request.id for request in batch.requests]
    connection.execute(
        insert(batch_requests), [{"batch": batch.id, "position": i, "request": id} for i, id in enumerate(ids)]
    )
    mine = requests.c.id.in_(select(batch_requests.c.request).where(batch_requests.c.batch == batch.id))
    connection.execute(update(requests).where(mine).values(state=RequestState.BATCHED, batch=batch.id))
    _record(connection, ids, RequestState.ACCEPTED, RequestState.BATCHED, batch.created, batch=batch.id)


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
