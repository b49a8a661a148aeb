"""Seals the texts of requests, chains the audit log, and lets the database itself refuse what no code may do.

One transaction: a database is as the release before left it, or as this one wants it. No copy is made first, because it
would hold in the clear what is sealed here; make one with `expunge backup` of the release before.
"""

from collections.abc import Iterator

import sqlalchemy as sa
from alembic import context, op

from expunge.requests.audit import Head, link_of
from expunge.requests.documents import seal_folder
from expunge.requests.vault import Vault
from expunge.types import RemovalRequest

revision = "0004"
down_revision = "0003"

_ROWS = 500

_MOVES = {
    "accepted": ("batched", "withdrawn"),
    "batched": ("removed", "accepted", "failed", "not_reproduced"),
    "removed": ("accepted", "purged"),
    "failed": ("accepted", "withdrawn", "purged"),
    "not_reproduced": ("accepted", "withdrawn", "purged"),
    "withdrawn": ("purged",),
}
"""The table of expunge.requests.lifecycle when this migration was made."""

_SQLITE = {
    "requests_lifecycle": (
        "BEFORE UPDATE OF state ON requests WHEN OLD.state <> NEW.state AND OLD.state || '>' || NEW.state NOT IN "
        "({moves}) BEGIN SELECT RAISE(ABORT, 'a request cannot go from this state to that'); END"
    ),
    "requests_kept": "BEFORE DELETE ON requests BEGIN SELECT RAISE(ABORT, 'requests are never deleted'); END",
    "events_unchanged": "BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'the audit log is only added to'); END",
    "events_kept": "BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'the audit log is only added to'); END",
}

_POSTGRESQL = (
    "CREATE FUNCTION expunge_lifecycle() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
    "IF OLD.state <> NEW.state AND OLD.state || '>' || NEW.state NOT IN ({moves}) THEN "
    "RAISE EXCEPTION USING MESSAGE = 'a request cannot go from ' || OLD.state || ' to ' || NEW.state; END IF; "
    "RETURN NEW; END $$",
    "CREATE FUNCTION expunge_kept() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
    "RAISE EXCEPTION USING MESSAGE = 'rows of ' || TG_TABLE_NAME || ' are never deleted or rewritten'; END $$",
    "CREATE TRIGGER requests_lifecycle BEFORE UPDATE OF state ON requests "
    "FOR EACH ROW EXECUTE FUNCTION expunge_lifecycle()",
    "CREATE TRIGGER requests_kept BEFORE DELETE ON requests FOR EACH ROW EXECUTE FUNCTION expunge_kept()",
    "CREATE TRIGGER events_kept BEFORE UPDATE OR DELETE ON events FOR EACH ROW EXECUTE FUNCTION expunge_kept()",
)


def upgrade() -> None:
    vault: Vault = context.config.attributes["vault"]
    _tables()
    connection = op.get_bind()
    identity = sa.table("identity", sa.column("name"), sa.column("value"))
    connection.execute(sa.insert(identity).values(name="key", value=vault.fingerprint))
    _seal_requests(connection, vault)
    _chain_events(connection, vault)
    _guard(connection.dialect.name)
    seal_folder(context.config.attributes["runs"], vault)  # last: a file cannot be rolled back, only sealed further


def _tables() -> None:
    op.add_column("requests", sa.Column("data_key", sa.String(128)))
    for name, length in (("actor", 200), ("reason", 32), ("release", 64), ("link", 64)):
        op.add_column("events", sa.Column(name, sa.String(length), nullable=False, server_default=""))
    op.create_table(
        "request_blobs",
        sa.Column("blob", sa.String(64), nullable=False),
        sa.Column("request", sa.String(63), nullable=False),
        sa.PrimaryKeyConstraint("blob", "request", name="pk_request_blobs"),
        sa.ForeignKeyConstraint(["request"], ["requests.id"], name="fk_request_blobs_request_requests"),
    )
    op.create_index("ix_request_blobs_request", "request_blobs", ["request"])
    op.create_table(
        "audit_head",
        sa.Column("id", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("link", sa.String(64), nullable=False),
        sa.Column("seal", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_audit_head"),
    )


def _seal_requests(connection: sa.Connection, vault: Vault) -> None:
    columns = ("id", "model", "external_id", "data_key", "body", "evidence")
    table = sa.table("requests", *map(sa.column, columns))
    blobs = sa.table("request_blobs", sa.column("blob"), sa.column("request"))
    for rows in _pages(connection, table, sa.column("id")):
        for row in rows:
            envelope = vault.new(row.id)
            request = RemovalRequest.model_validate_json(row.body)
            sealed = {
                "external_id": vault.external_id(row.model, row.external_id),
                "data_key": envelope.wrapped,
                "body": envelope.close("body", row.body),
                "evidence": None if row.evidence is None else envelope.close("evidence", row.evidence),
            }
            connection.execute(sa.update(table).where(table.c.id == row.id).values(sealed))
            named = [{"blob": vault.blob(blob), "request": row.id} for blob in {*request.blobs}]
            connection.execute(sa.insert(blobs), named)


def _chain_events(connection: sa.Connection, vault: Vault) -> None:
    """Seals what the earlier releases wrote, and begins the chain with it: the rows count as they were found."""
    from expunge.requests.tables import events

    keys = sa.table("requests", sa.column("id"), sa.column("data_key"))
    seq, link = 0, ""
    for rows in _pages(connection, events, events.c.id):
        ids = {row.request for row in rows}
        query = sa.select(keys.c.id, keys.c.data_key).where(keys.c.id.in_(ids))
        wrapped = {id: key for id, key in connection.execute(query).all()}
        for row in rows:
            envelope = vault.envelope(row.request, wrapped[row.request])
            detail = envelope.close("detail", row.detail) if row.detail else ""
            seq, link = row.id, link_of(vault.audit, link, {**row._mapping, "detail": detail})
            connection.execute(sa.update(events).where(events.c.id == seq).values(detail=detail, link=link))
    head = sa.table("audit_head", *map(sa.column, ("id", "seq", "link", "seal")))
    seal = Head(seq=seq, link=link).seal(vault.audit)
    connection.execute(sa.insert(head).values(id=1, seq=seq, link=link, seal=seal))


def _pages(connection: sa.Connection, table: sa.FromClause, key: sa.ColumnElement) -> Iterator[list[sa.Row]]:
    """Yields the rows in the order of `key`, some at a time."""
    last: object = None
    while True:
        query = sa.select(table).order_by(key).limit(_ROWS)
        rows = list(connection.execute(query if last is None else query.where(key > last)))
        if not rows:
            return
        yield rows
        last = rows[-1].id


def _guard(dialect: str) -> None:
    moves = ", ".join(f"'{here}>{to}'" for here, after in _MOVES.items() for to in after)
    if dialect == "sqlite":
        for name, body in _SQLITE.items():
            op.execute(sa.text(f"CREATE TRIGGER {name} {body.format(moves=moves)}"))
    elif dialect == "postgresql":
        for statement in _POSTGRESQL:
            op.get_bind().exec_driver_sql(statement.replace("{moves}", moves))
