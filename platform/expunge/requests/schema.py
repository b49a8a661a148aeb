"""The tables of the request store, and the records read from them.

Portable SQL only: SQLite embedded, PostgreSQL on a cluster. Documents are kept as JSON text, so that what was accepted
is given back to the letter on both.
"""

from datetime import UTC, datetime

from pydantic import JsonValue
from sqlalchemy import (
    BigInteger,
    Column,
    Date,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

from expunge.errors import StorageError
from expunge.words import BlobId, Identifier, RemovalRequest, RequestState, Word


class RequestEvent(Word):
    """One line of the audit trail."""

    at: datetime
    previous: RequestState | None
    state: RequestState
    batch: Identifier | None
    detail: str


class RequestRecord(Word):
    """A request and where it stands. `batch` is the latest one it was in, also after it went back to the queue."""

    request: RemovalRequest
    state: RequestState
    batch: Identifier | None
    attempts: int
    accepted_at: datetime
    evidence: dict[str, JsonValue] | None
    history: tuple[RequestEvent, ...]


class BatchRecord(Word):
    """One night: open until `closed`; `report` names the sealed report once there is one.

    `starts` counts the drivers that have begun on it since it last got any further.
    """

    id: Identifier
    created: datetime
    closed: datetime | None
    starts: int
    report: BlobId | None
    requests: tuple[Identifier, ...]


class UtcDateTime(TypeDecorator[datetime]):
    """SQLite forgets time zones: what is stored is UTC, what is read says so."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


class State(TypeDecorator[RequestState]):
    """By value: some drivers would store an enum's name."""

    impl = String(16)
    cache_ok = True

    def process_bind_param(self, value: RequestState | None, dialect: Dialect) -> str | None:
        return None if value is None else value.value

    def process_result_value(self, value: str | None, dialect: Dialect) -> RequestState | None:
        if value is None:
            return None
        if value not in set(RequestState):
            raise StorageError(
                f"the database holds a request in an unknown state, {value[:16]!r}",
                hint="upgrade expunge, or restore it from a backup",
            )
        return RequestState(value)


class clock(FunctionElement[datetime]):
    """The time at which the statement runs, by the database's own clock.

    An embedded SQLite has none but this machine's. That is enough: its write-ahead log serves one machine only.
    """

    type = UtcDateTime()
    inherit_cache = True


@compiles(clock, "sqlite")
def _clock_of_sqlite(element: clock, compiler: SQLCompiler, **_: object) -> str:
    return "strftime('%Y-%m-%d %H:%M:%f', 'now')"


@compiles(clock, "postgresql")
def _clock_of_postgresql(element: clock, compiler: SQLCompiler, **_: object) -> str:
    return "clock_timestamp()"  # now() would be the start of the transaction


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

identity = Table(
    "identity",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("value", String(64), nullable=False),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("created", UtcDateTime, nullable=False),
    Column("closed", UtcDateTime),
    Column("report", String(64)),
    Column("starts", Integer, nullable=False, server_default="0"),
    Column("advance", Integer, nullable=False, server_default="0"),
)

requests = Table(
    "requests",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("model", String(63), nullable=False),
    Column("external_id", String(200), nullable=False),
    Column("state", State, nullable=False),
    Column("batch", String(63), ForeignKey("batches.id")),
    Column("attempts", Integer, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("due", Date),
    Column("accepted_at", UtcDateTime, nullable=False),
    Column("body", Text, nullable=False),
    Column("evidence", Text),
    UniqueConstraint("model", "external_id"),
    Index("ix_requests_queue", "state", "priority", "due", "accepted_at"),
    Index("ix_requests_arrival", "accepted_at", "id"),
)

batch_requests = Table(
    "batch_requests",
    metadata,
    Column("batch", String(63), ForeignKey("batches.id"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("request", String(63), ForeignKey("requests.id"), nullable=False, index=True),
)

events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("request", String(63), ForeignKey("requests.id"), nullable=False, index=True),
    Column("at", UtcDateTime, nullable=False),
    Column("previous", State),
    Column("state", State, nullable=False),
    Column("batch", String(63)),
    Column("detail", Text, nullable=False),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(200), primary_key=True),
    Column("holder", String(32), nullable=False),
    Column("node", String(255), nullable=False),
    Column("place", String(100), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("started", BigInteger, nullable=False),
    Column("acquired", UtcDateTime, nullable=False),
    Column("heartbeat", UtcDateTime, nullable=False),
    Column("expires", UtcDateTime, nullable=False),
)
