"""The outbox: what is to be told to a webhook, in the database, so that a kill at any moment loses none of it.

A champion is an alias in another database, MLflow's. So a message is written before the alias is moved, in the
transaction of the audit log's events, and confirmed after it. Whoever next looks, under the model's promotion lock,
decides about a message that was never confirmed by asking for the champion.
"""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sqlalchemy import ColumnElement, Connection, Row, delete, insert, select, update

from expunge.requests.tables import outbox

Event = Literal["promotion", "rollback"]
LONGEST_ERROR = 200


@dataclass(frozen=True)
class Notice:
    """A change of a model's champion, in ids alone: nobody's name, picture or text."""

    event: Event
    model: str
    version: str
    previous: str | None
    brought_back: Sequence[str] = ()
    """Ids of removed requests that the new champion does not remove."""

    def body(self, at: datetime) -> str:
        """Return the JSON that is sent; its `id` tells a message from a repetition of it."""
        content = {
            "id": secrets.token_hex(16),
            "at": at.isoformat(timespec="seconds"),
            "event": self.event,
            "model": self.model,
            "version": self.version,
            "previous": self.previous,
            "brought_back": list(self.brought_back),
        }
        return json.dumps(content)


@dataclass(frozen=True)
class Message:
    """A notice as it lies in the outbox."""

    number: int
    event: str
    model: str
    version: str
    body: str
    created: datetime
    happened: datetime | None
    """None if it is not known that the champion was replaced."""
    delivered: datetime | None
    attempts: int
    error: str
    """Why the last attempt failed."""


def write(connection: Connection, notice: Notice, at: datetime) -> int:
    """Adds a notice that has yet to happen; returns its number."""
    values = {"event": notice.event, "model": notice.model, "version": notice.version}
    made = connection.execute(insert(outbox).values(**values, body=notice.body(at), created=at, attempts=0, error=""))
    key = made.inserted_primary_key
    assert key is not None
    return int(key[0])


def confirm(connection: Connection, number: int, at: datetime) -> None:
    connection.execute(update(outbox).where(outbox.c.id == number).values(happened=at))


def drop(connection: Connection, number: int) -> None:
    connection.execute(delete(outbox).where(outbox.c.id == number))


def record(connection: Connection, number: int, at: datetime, error: str) -> None:
    """Counts an attempt to deliver; without an error, it has succeeded."""
    values = {"attempts": outbox.c.attempts + 1, "error": error[:LONGEST_ERROR], "delivered": None if error else at}
    connection.execute(update(outbox).where(outbox.c.id == number).values(values))


def messages(connection: Connection, *which: ColumnElement[bool]) -> list[Message]:
    """Returns messages in the order in which they were written."""
    return [_message(row) for row in connection.execute(select(outbox).where(*which).order_by(outbox.c.id))]


UNCONFIRMED = outbox.c.happened.is_(None)
WAITING = outbox.c.happened.is_not(None) & outbox.c.delivered.is_(None)


def _message(row: Row) -> Message:
    return Message(
        number=row.id,
        event=row.event,
        model=row.model,
        version=row.version,
        body=row.body,
        created=row.created,
        happened=row.happened,
        delivered=row.delivered,
        attempts=row.attempts,
        error=row.error,
    )
