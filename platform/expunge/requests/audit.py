"""The audit log: one event per step of a request, in a chain that only the holder of the sealing key can continue.

Each event carries `link`, an HMAC over the event and the link before it, so that a row that is changed, removed or put
in between breaks the chain. The row `audit_head` signs the last link, and the home keeps a copy of it (`audit.json`):
without the copy, an insider could put back an old database as a whole. Order is the number of the event, never its
time, because a clock can be set back. A text in an event is sealed with the request's data key, and the link covers
the sealed form: the chain still holds when a purge has destroyed the key.
"""

import json
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from sqlalchemy import Connection, func, insert, select, update

from expunge.errors import StorageError
from expunge.requests import keys
from expunge.requests.tables import audit_head, events, requests
from expunge.requests.vault import Vault
from expunge.types import RequestState, Value

ANCHOR = "audit.json"

Reason = Literal[
    "submitted", "drained", "decided", "released", "resurfaced", "noted", "withdrawn", "requeued", "purged"
]
"""Why a request moved, as a word to count by; the event's text says more."""

_ROWS = 1000  # read at a time


class Head(Value):
    """The end of the chain: the number of the last event (0: none) and its link."""

    seq: int
    link: str

    def seal(self, key: bytes) -> str:
        return keys.sign(key, f"head {self.seq} {self.link}".encode())


class Anchor(Value):
    """`audit.json` in the home: a head that the chain once had, and so must still contain."""

    head: Head
    seal: str


@dataclass
class Trail:
    """Appends to the chain within one transaction, of which it is the first act: it locks the head.

    Raises StorageError if the head is not as it was signed.
    """

    connection: Connection
    vault: Vault
    actor: str
    head: Head = field(init=False)

    def __post_init__(self) -> None:
        row = self.connection.execute(select(audit_head).with_for_update()).one_or_none()
        if row is None or not keys.is_signed(self.vault.audit, f"head {row.seq} {row.link}".encode(), row.seal):
            raise StorageError("the audit log was altered", hint="run `expunge audit verify`, and restore a backup")
        self.head = Head(seq=row.seq, link=row.link)

    def append(
        self,
        ids: Sequence[str],
        previous: RequestState | None,
        state: RequestState,
        at: datetime,
        *,
        reason: Reason,
        batch: str | None = None,
        details: Mapping[str, str] | None = None,
    ) -> None:
        """Adds one event per request; `details`: sealed texts by request id."""
        if not ids:
            return
        rows = []
        seq, link = self.head.seq, self.head.link
        for id in ids:
            seq += 1
            row = {
                "id": seq,
                "request": id,
                "at": at,
                "previous": previous,
                "state": state,
                "batch": batch,
                "detail": (details or {}).get(id, ""),
                "actor": self.actor,
                "reason": reason,
                "release": release(),
            }
            link = link_of(self.vault.audit, link, row)
            rows.append({**row, "link": link})
        self.connection.execute(insert(events), rows)
        self.head = Head(seq=seq, link=link)
        self.connection.execute(update(audit_head).values(seq=seq, link=link, seal=self.head.seal(self.vault.audit)))


def link_of(key: bytes, before: str, event: Mapping[str, object]) -> str:
    """Returns the link of an event, given by the names of its columns, that follows the link `before`."""
    at, previous, state = event["at"], event["previous"], event["state"]
    assert isinstance(at, datetime)
    content = [
        before,
        event["id"],
        event["request"],
        at.astimezone(UTC).isoformat(timespec="microseconds"),
        None if previous is None else str(previous),
        str(state),
        *(event[name] for name in ("batch", "detail", "actor", "reason", "release")),
    ]
    return keys.sign(key, json.dumps(content).encode())


@dataclass(frozen=True)
class Verified:
    """What a look at the whole log found. `problem` names the first row that is wrong."""

    events: int
    problem: str | None
    backwards: tuple[int, ...]
    """Numbers of events whose time is before that of the event before: a clock was set back. No sign of tampering."""
    anchored: int | None
    """The number of the event that the home's copy of the head names; None without a copy."""


def verify(connection: Connection, vault: Vault, anchor: Anchor | None) -> Verified:
    """Recomputes every link, and compares the end with the head, with the home's copy, and with the requests."""
    link, seq, count, problem = "", 0, 0, None
    backwards: list[int] = []
    latest: datetime | None = None
    anchored = None if anchor is None else anchor.head
    query = select(events).order_by(events.c.id).execution_options(yield_per=_ROWS)
    with connection.execute(query) as rows:
        for row in rows:
            if row.link != link_of(vault.audit, link, row._asdict()):
                problem = f"event {row.id} (request {row.request}) was altered, or an event before it was removed"
                break
            if latest is not None and row.at < latest:
                backwards.append(row.id)
            if anchored is not None and row.id == anchored.seq and row.link != anchored.link:
                problem = f"event {row.id} is not the one that {ANCHOR} in the home names: an old database was put back"
                break
            link, seq, count, latest = row.link, row.id, count + 1, row.at
    problem = problem or _end(connection, vault, Head(seq=seq, link=link), anchor) or _states(connection)
    return Verified(count, problem, tuple(backwards), None if anchored is None else anchored.seq)


def _end(connection: Connection, vault: Vault, last: Head, anchor: Anchor | None) -> str | None:
    row = connection.execute(select(audit_head)).one_or_none()
    if row is None or row.seal != Head(seq=row.seq, link=row.link).seal(vault.audit):
        return "the head of the log was altered"
    if (row.seq, row.link) != (last.seq, last.link):
        return f"the log ends at event {last.seq}, and its head names event {row.seq}: events were cut off"
    if anchor is None:
        return None
    if anchor.seal != anchor.head.seal(vault.audit):
        return f"{ANCHOR} in the home was altered"
    if anchor.head.seq > last.seq:
        return f"the log ends at event {last.seq}, and {ANCHOR} in the home names event {anchor.head.seq}: cut off"
    return None


def _states(connection: Connection) -> str | None:
    """Compares each request's state with its last event: an update past the log shows here."""
    last = select(func.max(events.c.id)).group_by(events.c.request)
    said = select(events.c.request, events.c.state).where(events.c.id.in_(last)).subquery()
    query = (
        select(requests.c.id)
        .outerjoin(said, said.c.request == requests.c.id)
        .where(said.c.state.is_(None) | (said.c.state != requests.c.state))
        .order_by(requests.c.id)
        .limit(1)
    )
    id = connection.execute(query).scalar()
    return None if id is None else f"request {id} is in a state that its last event does not name"


def recall_anchor(home: Path) -> Anchor | None:
    """Reads the home's copy of the head. Raises StorageError if it is damaged."""
    try:
        return Anchor.model_validate_json((home / ANCHOR).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        raise StorageError(f"{home / ANCHOR} cannot be read", hint="restore it, or delete it to start over") from None


def keep_anchor(connection: Connection, vault: Vault, home: Path) -> Anchor | None:
    """Returns the home's copy as it should be: of the present head, if that continues what the copy names.

    A copy that the chain does not contain is left as it is, because it is the proof.
    """
    row = connection.execute(select(audit_head)).one()
    head = Head(seq=row.seq, link=row.link)
    new = Anchor(head=head, seal=head.seal(vault.audit))
    old = recall_anchor(home)
    if old is None:
        return new
    link = connection.execute(select(events.c.link).where(events.c.id == old.head.seq)).scalar()
    return new if old.head.seq < head.seq and (old.head.seq == 0 or link == old.head.link) else None


def write_anchor(anchor: Anchor, home: Path) -> None:
    """Replaces the copy. It may lag behind the log, never be ahead: so it is not waited for, and may fail."""
    new = home / f".{ANCHOR}.{secrets.token_hex(6)}.tmp"
    with suppress(OSError):
        new.touch(0o600)
        new.write_text(anchor.model_dump_json())
        new.replace(home / ANCHOR)


@cache
def release() -> str:
    """Returns the version of the code that writes an event."""
    try:
        return version("expunge")
    except PackageNotFoundError:
        return "unknown"
