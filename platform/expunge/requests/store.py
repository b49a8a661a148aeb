"""The durable queue: accepted once, drained into batches, never lost, every step in the audit log."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import date, datetime
from pathlib import Path

from pydantic import JsonValue, TypeAdapter, ValidationError
from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from expunge.errors import InputError, StorageError, TransitionError
from expunge.requests import audit, changes, outbox, queries
from expunge.requests.audit import Trail, Verified, keep_anchor, recall_anchor, write_anchor
from expunge.requests.blobs import sealing_key
from expunge.requests.database import Database
from expunge.requests.home import recall, remember
from expunge.requests.outbox import Message, Notice
from expunge.requests.queries import Backlog
from expunge.requests.records import BatchRecord, RequestRecord
from expunge.requests.tables import batches, identity, requests
from expunge.requests.vault import Vault
from expunge.settings import IDENTIFIER_RULE, Settings
from expunge.types import DEFAULT_TENANT, BlobId, Identifier, RemovalBatch, RemovalRequest, RequestState

Records = list[RequestRecord]
Batches = list[BatchRecord]
Ids = list[str]
Messages = list[Message]

MAX_STARTS = 3
"""Drivers that may begin on a batch without getting any further, before it is given up."""

_IDENTIFIER: TypeAdapter[str] = TypeAdapter(Identifier)
_BLOB_ID: TypeAdapter[str] = TypeAdapter(BlobId)


class RequestStore:
    """Every method is atomic, and raises UnavailableError or StorageError when the database does not serve."""

    def __init__(
        self,
        database: Database,
        vault: Vault,
        home: Path,
        actor: str,
        due_days: int = 0,
        tenant: str = DEFAULT_TENANT,
        *,
        announces: bool = False,
    ) -> None:
        """Takes what a connection does not say.

        home: where the copy of the audit log's head is kept. actor: who acts, for the audit log. due_days: when a
        request that names no date is due; 0: never. tenant: whose are the requests that are added and found. announces:
        whether there is a webhook to write notices for.
        """
        self.database, self.vault, self.actor, self.tenant = database, vault, actor, tenant
        self._home, self._due_days, self._announces = home, due_days, announces

    def close(self) -> None:
        self.database.close()

    def acting(self, actor: str, tenant: str) -> "RequestStore":
        """Returns the same store for somebody else. `list` and `get` show every tenant's requests all the same."""
        return RequestStore(
            self.database, self.vault, self._home, actor, self._due_days, tenant, announces=self._announces
        )

    def read(self) -> AbstractContextManager[Connection]:
        """A transaction to read all rows at once."""
        return self.database.read()

    @contextmanager
    def _change(self) -> Iterator[Trail]:
        """A transaction with its events in the audit log; the home's copy of the log's head follows it."""
        with self.database.write() as connection:
            trail = Trail(connection, self.vault, self.actor)
            before = trail.head
            yield trail
            anchor = keep_anchor(connection, self.vault, self._home) if trail.head != before else None
        if anchor is not None:
            write_anchor(anchor, self._home)

    def verify_audit(self) -> Verified:
        """Recomputes the whole audit log."""
        with self.database.read() as connection:
            return audit.verify(connection, self.vault, recall_anchor(self._home))

    def add(self, request: RemovalRequest) -> tuple[RequestRecord, bool]:
        """Accepts a request. False means that its (tenant, model, external_id) was known; that one is returned.

        Raises InputError if the known one has other content.
        """
        known = self.find(request.model, request.external_id)
        if known is None:
            try:
                with self._change() as trail:
                    changes.accept(trail, request, tenant=self.tenant, due_days=self._due_days)
                return self.get(request.id), True
            except IntegrityError:  # another process accepted it in between
                known = self.find(request.model, request.external_id)
        if known is None:
            raise StorageError(f"request id {request.id} is taken", hint="submit it again")
        check_same(known, request)
        return known, False

    def get(self, request_id: str) -> RequestRecord:
        """Raises NotFoundError."""
        with self.database.read() as connection:
            return queries.record(connection, request_id, self.vault)

    def find(self, model: str, external_id: str) -> RequestRecord | None:
        """Returns this tenant's request of that external id."""
        with self.database.read() as connection:
            hashed = self.vault.external_id(model, external_id, self.tenant)
            where = (requests.c.model == model) & (requests.c.external_id == hashed)
            return next(iter(queries.records(connection, select(requests).where(where), self.vault)), None)

    def list(
        self,
        model: str | None = None,
        state: RequestState | None = None,
        batch: str | None = None,
        limit: int | None = None,
        after: str | None = None,
        *,
        history: bool = True,
        by_due: bool = False,
        tenant: str | None = None,
        due_by: date | None = None,
    ) -> Records:
        """Returns the oldest first, from the request after `after`; without `history`, each has an empty one.

        With `by_due`, what is due soonest comes first, and what has no due date last. With `due_by`, lists what is due
        on that day or earlier.

        `batch` finds every request that was ever in it, also those that went back to the queue. Raises NotFoundError
        if there is no request `after`.
        """
        wanted = queries.Wanted(model, state, batch, tenant, due_by)
        with self.database.read() as connection:
            query = queries.page(connection, requests, wanted, after, limit, by_due=by_due)
            return queries.records(connection, query, self.vault, history=history)

    def each(
        self,
        model: str | None = None,
        state: RequestState | None = None,
        batch: str | None = None,
        limit: int | None = None,
        after: str | None = None,
        *,
        by_due: bool = False,
    ) -> Iterator[RequestRecord]:
        """Yields what `list` returns one by one: however many there are, only a few hundred are held at a time."""
        with self.database.read() as connection:
            wanted = queries.Wanted(model, state, batch)
            query = queries.page(connection, requests.c.id, wanted, after, limit, by_due=by_due)
            ids = connection.execute(query).scalars().all()
        for start in range(0, len(ids), queries.IDS_PER_STATEMENT):
            some = ids[start : start + queries.IDS_PER_STATEMENT]
            with self.database.read() as connection:
                found = queries.records(connection, select(requests).where(requests.c.id.in_(some)), self.vault)
            records = {record.request.id: record for record in found}
            yield from (records[id] for id in some)

    def total(self, model: str | None = None, state: RequestState | None = None, batch: str | None = None) -> int:
        """Counts what `list` would return without a limit."""
        query = queries.Wanted(model, state, batch).among(select(func.count()).select_from(requests))
        with self.database.read() as connection:
            return connection.execute(query).scalar_one()

    def backlog(self, states: Collection[RequestState]) -> Backlog:
        """Counts what waits, for each model and each of these states."""
        with self.database.read() as connection:
            return queries.backlog(connection, states)

    def identity(self) -> str:
        """Returns the database's own id, which was made with it."""
        with self.database.read() as connection:
            return connection.execute(select(identity.c.value).where(identity.c.name == "database")).scalar_one()

    def check_key(self) -> None:
        """Raises StorageError if the texts of this database are sealed with another key."""
        with self.database.read() as connection:
            there = connection.execute(select(identity.c.value).where(identity.c.name == "key")).scalar()
        if there != self.vault.fingerprint:
            raise StorageError(
                f"the database is sealed with another key: its fingerprint is {there}, and that of the key here is "
                f"{self.vault.fingerprint}",
                hint=f"set EXPUNGE_BLOB_KEY to the key whose fingerprint is {there}",
            )

    def count(self, state: RequestState, models: Sequence[str] | None = None) -> int:
        """Counts the requests in `state`; with `models`, only those of these models."""
        query = select(func.count()).select_from(requests).where(requests.c.state == state)
        if models is not None:
            query = query.where(requests.c.model.in_(models))
        with self.database.read() as connection:
            return connection.execute(query).scalar_one()

    def ids(self, state: RequestState, models: Sequence[str] | None = None) -> dict[str, Ids]:
        """The ids of the requests in `state` by model, oldest first."""
        with self.database.read() as connection:
            return queries.ids_by_model(connection, state, models)

    def open_batches(self, models: Sequence[str] | None = None) -> dict[str, int]:
        """How many undecided requests each batch holds; with `models`, only requests of those count."""
        with self.database.read() as connection:
            return queries.open_batches(connection, models)

    def drain(
        self,
        batch_id: str | None,
        models: Sequence[str] | None = None,
        limit: int | None = None,
        skip: Collection[str] = (),
        only: Collection[str] | None = None,
        choose: changes.Choose | None = None,
    ) -> RemovalBatch:
        """Moves accepted requests into a batch, by priority, due date and arrival: all of them, or the first `limit`.

        If `batch_id` already holds requests, returns them again and drains nothing. Without a `batch_id`, continues the
        oldest open batch (with `models`: one of those models only; never one of `skip`), else makes
        `night-YYYYMMDD-xxxxxx`. If nothing waits, the batch returned is empty and not kept. With `only`, drains no
        other requests, and continues an open batch only if it has one of them to decide. With `choose`, a new
        batch takes what that yields of what waits, which it is given in turn. Raises InputError for an id that is not
        an identifier.
        """
        if batch_id is not None:
            _check(_IDENTIFIER, batch_id, "batch id", IDENTIFIER_RULE)
        try:
            with self._change() as trail:
                return changes.drain(trail, batch_id, models, limit, skip, only, choose)
        except IntegrityError:  # another process made the same batch in between: read it
            with self._change() as trail:
                return changes.drain(trail, batch_id, models, limit, skip, only, choose)

    def oldest_open(
        self, models: Sequence[str] | None = None, skip: Collection[str] = (), only: Collection[str] | None = None
    ) -> str | None:
        """Returns the batch that `drain` without an id would continue; None if it would make one."""
        with self.database.read() as connection:
            return queries.oldest_open(connection, models, skip, only)

    def expected(self, models: Sequence[str] | None = None) -> Iterator[queries.Expected]:
        """Yields what waits in the order in which it is drained; only a few hundred are held at a time."""
        with self.database.read() as connection:
            yield from queries.expected(connection, models)

    def make_batch(self, batch_id: str) -> None:
        """Makes a batch that holds no request, unless it is there. Raises InputError for an id that is none."""
        _check(_IDENTIFIER, batch_id, "batch id", IDENTIFIER_RULE)
        with suppress(IntegrityError), self.database.write() as connection:
            if not queries.has_batch(connection, batch_id):
                connection.execute(insert(batches), {"id": batch_id, "created": changes.now()})

    def start_batch(self, batch_id: str, advance: int) -> int:
        """Counts one more driver that begins on a batch; returns how many have begun since it last got any further.

        advance: a number that grows as the batch gets further. Raises NotFoundError.
        """
        with self.database.write() as connection:
            return changes.start_batch(connection, batch_id, advance)

    def has_ended(self, batch_id: str) -> bool:
        """True if the batch is closed; False also if it does not exist."""
        with self.database.read() as connection:
            return connection.execute(select(batches.c.closed).where(batches.c.id == batch_id)).scalar() is not None

    def release_batch(self, batch_id: str, why: str) -> None:
        """Ends a batch that cannot be run: undecided requests go back to the queue, and no attempt is counted."""
        with self._change() as trail:
            changes.release(trail, batch_id, why)

    def resurface(self, batch_id: str, request_ids: Sequence[str], why: str) -> None:
        """Moves removed requests whose removal no model holds any more into a batch, to be removed again; all or none.

        Raises NotFoundError, and TransitionError where one is not removed.
        """
        with self._change() as trail:
            changes.resurface(trail, batch_id, request_ids, why)

    def note(self, request_ids: Sequence[str], detail: str, notice: Notice | None = None) -> int | None:
        """Adds a line about each request to the audit trail without moving it; unknown ids are left out.

        The notice goes into the outbox in the same transaction, if a webhook is set; returns its number there.
        """
        with self._change() as trail:
            changes.note(trail, request_ids, detail)
            if notice is None or not self._announces:
                return None
            return outbox.write(trail.connection, notice, changes.now())

    def confirm(self, number: int) -> None:
        """Records that what a notice announces has happened, so that it is delivered."""
        with self.database.write() as connection:
            outbox.confirm(connection, number, changes.now())

    def forget(self, number: int) -> None:
        """Deletes a notice of something that has not happened."""
        with self.database.write() as connection:
            outbox.drop(connection, number)

    def record_attempt(self, number: int, error: str) -> None:
        """Counts an attempt to deliver a message; without an error, it has arrived."""
        with self.database.write() as connection:
            outbox.record(connection, number, changes.now(), error)

    def unconfirmed(self, model: str | None = None) -> Messages:
        """Returns the messages of which it is not known whether they have happened."""
        with self.database.read() as connection:
            found = outbox.messages(connection, outbox.UNCONFIRMED)
        return [message for message in found if model in (None, message.model)]

    def outgoing(self) -> Messages:
        """Returns the messages that are to be delivered, in their order."""
        with self.database.read() as connection:
            return outbox.messages(connection, outbox.WAITING)

    def all_messages(self) -> Messages:
        with self.database.read() as connection:
            return outbox.messages(connection)

    def transition(
        self,
        request_id: str,
        to: RequestState,
        *,
        reason: audit.Reason = "decided",
        detail: str = "",
        evidence: dict[str, JsonValue] | None = None,
        batch: str | None = None,
        attempt: bool = True,
    ) -> RequestRecord:
        """Moves a request along its lifecycle; if it is in that state already, nothing changes.

        With `batch`, the request must still be in that batch. A night that ends without a removal counts as an attempt
        unless `attempt` is false: the night failed, not the request. Raises NotFoundError, TransitionError naming both
        states.
        """
        with self._change() as trail:
            changes.transition(
                trail, request_id, to, reason=reason, detail=detail, evidence=evidence, batch=batch, attempt=attempt
            )
            return queries.record(trail.connection, request_id, self.vault)

    def purge(self, request_id: str, certificate: str) -> RequestRecord:
        """Destroys a request's texts for good; its pictures are the caller's. Raises NotFoundError, TransitionError."""
        with self._change() as trail:
            changes.purge(trail, request_id, certificate)
            return queries.record(trail.connection, request_id, self.vault)

    def batch(self, batch_id: str) -> BatchRecord:
        """Raises NotFoundError."""
        with self.database.read() as connection:
            return queries.batch_record(connection, batch_id)

    def batches(self) -> Batches:
        """Oldest first."""
        with self.database.read() as connection:
            ids = connection.execute(select(batches.c.id).order_by(batches.c.created, batches.c.id)).scalars().all()
            return [queries.batch_record(connection, id) for id in ids]

    def set_report(self, batch_id: str, blob_id: str) -> None:
        """Records the sealed report of a batch; a later one replaces it. Raises NotFoundError, InputError."""
        _check(_BLOB_ID, blob_id, "report", "give the id that the blob store returned")
        with self.database.write() as connection:
            queries.batch_record(connection, batch_id)
            connection.execute(update(batches).where(batches.c.id == batch_id).values(report=blob_id))

    def drop_report(self, batch_id: str) -> str | None:
        """Forgets the report of a batch, whose blob the caller deletes; returns its id if there was one."""
        mine = batches.c.id == batch_id
        with self.database.write() as connection:
            report = connection.execute(select(batches.c.report).where(mine)).scalar()
            connection.execute(update(batches).where(mine).values(report=None))
        return report

    def unmoved(self, state: RequestState, before: datetime) -> Ids:
        """Returns the ids of the requests that came into `state` before this time and have stayed in it."""
        with self.database.read() as connection:
            return queries.unmoved(connection, state, before)

    def close_batch(self, batch_id: str) -> None:
        """Closes a batch, even twice. Raises TransitionError while a request in it is undecided, NotFoundError."""
        with self.database.write() as connection:
            if queries.batch_record(connection, batch_id).closed is not None:
                return
            count = len(queries.undecided(connection, batch_id))
            if count:
                raise TransitionError(
                    f"batch {batch_id} holds {count} undecided requests", hint="decide or requeue each, then close it"
                )
            connection.execute(update(batches).where(batches.c.id == batch_id).values(closed=changes.now()))


def open_store(settings: Settings, *, patience: float = 15.0) -> RequestStore:
    """Connects and brings the schema up to date; waits `patience` seconds for a lock or a server that is away.

    Raises InputError, UnavailableError, and StorageError, also if the home remembers another database, or if its own is
    gone.
    """
    known = recall(settings)
    database = Database(settings.database, patience=patience)
    try:
        vault = Vault(sealing_key(settings))
        database.migrate(vault, settings.runs, exists=known is not None and known.database is not None)
        announces = bool(settings.webhooks.url)
        store = RequestStore(database, vault, settings.home, settings.acting, settings.due_days, announces=announces)
        remember(settings, database=store.identity())
        store.check_key()
    except BaseException:
        database.close()
        raise
    return store


def nothing_to_do(store: RequestStore, models: Sequence[str] | None) -> str:
    """Says in one line why a night has nothing to do, and never hides what waits.

    Raises InputError if a request waits in an open batch that this night must not continue: it was given the name of
    another batch, or models that are not all of the batch's.
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


def check_same(record: RequestRecord, request: RemovalRequest) -> None:
    """Raises InputError naming the fields in which `request` differs from the known one of the same external id."""
    known = record.request
    if record.state is RequestState.PURGED:
        raise InputError(f"external_id: {known.id} had it, and was purged", hint="use a new external_id")
    differing = [
        name for name in RemovalRequest.model_fields if name != "id" and getattr(known, name) != getattr(request, name)
    ]
    if differing:
        message = f"external_id: {known.id} has it already, with another {', '.join(differing)}"
        raise InputError(message, hint="use a new external_id, or submit the same content")


def _check(adapter: TypeAdapter[str], value: str, what: str, hint: str) -> None:
    try:
        adapter.validate_python(value)
    except ValidationError:
        raise InputError(f"{what} {value!r} is malformed", hint=hint) from None
