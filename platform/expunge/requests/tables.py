"""The tables of the request store.

Only portable SQL: SQLite embedded, PostgreSQL on a cluster. Documents are kept as JSON text, so that both return to the
letter what was accepted.
"""

from sqlalchemy import (
    BigInteger,
    Column,
    Date,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from expunge.requests.columns import State, UtcDateTime

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
    Column("tenant", String(63), nullable=False, server_default="default"),
    Column("model", String(63), nullable=False),
    Column("external_id", String(200), nullable=False),  # a keyed hash, over the tenant too
    Column("data_key", String(128)),  # wrapped by the sealing key
    Column("state", State, nullable=False),
    Column("batch", String(63), ForeignKey("batches.id")),
    Column("attempts", Integer, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("due", Date),
    Column("accepted_at", UtcDateTime, nullable=False),
    Column("body", Text, nullable=False),  # sealed, as evidence is
    Column("evidence", Text),
    UniqueConstraint("model", "external_id"),
    Index("ix_requests_queue", "state", "priority", "due", "accepted_at"),
    Index("ix_requests_arrival", "accepted_at", "id"),
    Index("ix_requests_tenant", "tenant", "accepted_at", "id"),
)

batch_requests = Table(
    "batch_requests",
    metadata,
    Column("batch", String(63), ForeignKey("batches.id"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("request", String(63), ForeignKey("requests.id"), nullable=False, index=True),
)

request_blobs = Table(
    "request_blobs",
    metadata,
    Column("blob", String(64), primary_key=True),  # a keyed hash
    Column("request", String(63), ForeignKey("requests.id"), primary_key=True, index=True),
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
    Column("detail", Text, nullable=False),  # sealed, unless it is empty
    Column("actor", String(200), nullable=False, server_default=""),
    Column("reason", String(32), nullable=False, server_default=""),
    Column("release", String(64), nullable=False, server_default=""),
    Column("link", String(64), nullable=False, server_default=""),
)

audit_head = Table(
    "audit_head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("seq", Integer, nullable=False),
    Column("link", String(64), nullable=False),
    Column("seal", String(64), nullable=False),
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("event", String(32), nullable=False),
    Column("model", String(63), nullable=False),
    Column("version", String(32), nullable=False),
    Column("body", Text, nullable=False),
    Column("created", UtcDateTime, nullable=False),
    Column("happened", UtcDateTime),
    Column("delivered", UtcDateTime),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("error", String(200), nullable=False, server_default=""),
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

tokens = Table(
    "tokens",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("tenant", String(63), nullable=False),
    Column("scopes", String(100), nullable=False),  # sorted, with spaces between them
    Column("created", UtcDateTime, nullable=False),
    Column("created_by", String(200), nullable=False),
    Column("expires", UtcDateTime),
    Column("revoked", UtcDateTime),
    Column("mac", String(64), nullable=False),  # over the secret and what it may do; empty once revoked
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("key", String(64), primary_key=True),  # a keyed hash
    Column("content", String(64), nullable=False),  # a keyed hash
    Column("created", UtcDateTime, nullable=False, index=True),
    Column("status", Integer),
    Column("answer", Text),  # sealed; none while the request is worked on
)
