"""Leases: of all the processes that share the request database, one holds a name, and the others see which.

A lease is a row. Its holder renews it every quarter of its time to live; it may be taken over once it has not been
renewed for that long, or at once where its process is known to be gone. Locks on files do not serve here: shared
volumes refuse them, or grant them to everybody.
"""

import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Connection, Row, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from expunge.errors import ExpungeError, UnavailableError
from expunge.logs import get_logger
from expunge.requests.columns import clock
from expunge.requests.database import Database
from expunge.requests.processes import Process, is_gone, this_process
from expunge.requests.store import RequestStore
from expunge.requests.tables import leases

TTL_S = 60.0
"""Seconds for which a lease outlives its last heartbeat."""
POLL_S = 0.5
"""Seconds between two looks of a process that waits for a lease."""

# Goes on while the machine sleeps, and stays when its clock is set.
_CLOCK = time.CLOCK_BOOTTIME if sys.platform == "linux" else time.CLOCK_MONOTONIC

_HELD: ContextVar[frozenset[tuple[str, str]]] = ContextVar("held", default=frozenset())
"""The leases, by database and name, that this thread holds: it would wait for itself forever."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease. All times are those of the database's clock."""

    node: str
    pid: int
    acquired: datetime
    heartbeat: datetime
    expires: datetime


class HeldError(UnavailableError):
    """Another process, or this one, holds the lease; `holder` says which."""

    holder: Holder

    @classmethod
    def by(cls, name: str, holder: Holder) -> "HeldError":
        since = f"{holder.acquired:%Y-%m-%d %H:%M:%S} UTC"
        error = cls(
            f"{name} has been held by process {holder.pid} on {holder.node} since {since}",
            hint=f"wait for it to end, or stop it; if its machine is down, retry after {holder.expires:%H:%M:%S} UTC",
        )
        error.holder = holder
        return error


class Lease:
    """A lease that this process has acquired. `lost` is set as soon as another process may hold it instead."""

    def __init__(self, database: Database, name: str, token: str, ttl: float, asked: float) -> None:
        self.name = name
        self.lost = threading.Event()
        self._database, self._token, self._ttl = database, token, ttl
        self._renewed = asked
        self._released = threading.Event()
        self._heart = threading.Thread(target=self._beat, name=f"heartbeat {name}", daemon=True)
        self._heart.start()
        # The heartbeat itself cannot tell while it hangs in a database that takes its time.
        threading.Thread(target=self._watch, name=f"watch {name}", daemon=True).start()

    def check(self) -> None:
        """Renews the lease to make sure that it is still held. Raises UnavailableError once it is lost."""
        if not self.lost.is_set():
            self._renew()
        if self.lost.is_set():
            raise UnavailableError(
                f"{self.name}: this process has lost its lease, and another one may be at work",
                hint="check that the database can be reached and that this machine was not paused, then run it again",
            )

    def release(self) -> None:
        """Stops the heartbeat and frees the lease; one that cannot be freed now runs out."""
        self._released.set()
        self._heart.join(self._ttl / 2)
        if self._heart.is_alive():  # it hangs in the database, and so would this
            return
        with suppress(ExpungeError), self._database.write() as connection:
            connection.execute(delete(leases).where(_is(self.name, self._token)))

    def _beat(self) -> None:
        try:
            while not self.lost.is_set() and not self._released.wait(self._ttl / 4):
                self._renew()
        except BaseException:  # without a heartbeat the lease runs out
            self.lost.set()
            raise

    def _watch(self) -> None:
        late = self._ttl * 3 / 4
        while not self._released.wait(max(0.0, late - self._age())):
            # After a pause of the whole process, the heartbeat has its turn first.
            if self._age() >= late and not self._released.wait(self._ttl / 4) and self._age() >= late:
                return self._lose("the database has not answered for too long")

    def _age(self) -> float:
        """Seconds since the last renewal that succeeded was asked for."""
        return time.clock_gettime(_CLOCK) - self._renewed

    def _renew(self) -> None:
        asked = time.clock_gettime(_CLOCK)
        try:
            with self._database.write() as connection:
                now = _now(connection)
                values = {"heartbeat": now, "expires": now + timedelta(seconds=self._ttl)}
                # If the row is still ours, nobody else has held the lease in the meantime, however long that was.
                kept = connection.execute(update(leases).where(_is(self.name, self._token)).values(values)).rowcount
        except ExpungeError as error:
            # A quarter early: by then the next try would end too late to be of use.
            if self._age() < self._ttl * 3 / 4:
                return
            self._lose(str(error))
            return
        if kept:
            self._renewed = asked
        else:
            self._lose("another process took it over, or removed it")

    def _lose(self, why: str) -> None:
        if not self.lost.is_set():
            self.lost.set()
            get_logger("requests").error("a lease was lost", lease=self.name, error=why)


@contextmanager
def lease(store: RequestStore, name: str, *, wait: bool = False, ttl: float = TTL_S) -> Iterator[Lease]:
    """Hold the lease on `name`, at most 200 characters, for the length of the block.

    Without `wait`, raises HeldError if it is held; with it, only if this very thread holds it. Raises UnavailableError
    or StorageError if the database does not serve.

    ttl: seconds; how long the lease outlives a holder whose machine is gone.
    """
    with closing(store.database.with_patience(ttl / 4)) as database:
        token = secrets.token_hex(16)
        asked = _acquire(database, name, token, ttl, wait=wait)
        held = Lease(database, name, token, ttl, asked)
        mine = (database.name, name)
        _HELD.set(_HELD.get() | {mine})
        try:
            yield held
        finally:
            _HELD.set(_HELD.get() - {mine})
            held.release()


def holder(store: RequestStore, name: str) -> Holder | None:
    """Returns the holder of the lease on `name`; None if it is free to be acquired."""
    return _look(store.database, name)


def _acquire(database: Database, name: str, token: str, ttl: float, *, wait: bool) -> float:
    """Returns when, by `_CLOCK`, it last asked for the lease: it lasts for `ttl` from then, or from a little later."""
    told = False
    while True:
        asked = time.clock_gettime(_CLOCK)
        # Those who wait only read, and so do not stand in the way of those who write.
        by = _look(database, name) or _take(database, name, token, ttl)
        if by is None:
            return asked
        if not wait or (database.name, name) in _HELD.get():
            raise HeldError.by(name, by)
        if not told:
            get_logger("requests").info("waiting for a lease", lease=name, node=by.node, pid=by.pid)
            told = True
        time.sleep(min(POLL_S, ttl / 4))


def _look(database: Database, name: str) -> Holder | None:
    with database.read() as connection:
        row = connection.execute(select(leases).where(leases.c.name == name)).one_or_none()
        return None if row is None or _is_free(row, _now(connection)) else _holder(row)


def _take(database: Database, name: str, token: str, ttl: float) -> Holder | None:
    """One transaction: takes the lease if it is free, else returns its holder."""
    while True:
        with suppress(IntegrityError), database.write() as connection:  # another process was first: look at it
            row = connection.execute(select(leases).where(leases.c.name == name).with_for_update()).one_or_none()
            now = _now(connection)  # after the row, for which this may have waited
            if row is not None and not _is_free(row, now):
                return _holder(row)
            times = {"acquired": now, "heartbeat": now, "expires": now + timedelta(seconds=ttl)}
            values = {"name": name, "holder": token, **asdict(this_process()), **times}
            if row is None:
                connection.execute(insert(leases), values)
                return None
            if connection.execute(update(leases).where(_is(name, row.holder)).values(values)).rowcount:
                get_logger("requests").warning("a lease was taken over", lease=name, node=row.node, pid=row.pid)
                return None


def _is(name: str, token: str) -> ColumnElement[bool]:
    return (leases.c.name == name) & (leases.c.holder == token)


def _now(connection: Connection) -> datetime:
    """The database's clock: nodes whose own clocks differ agree on it."""
    return connection.execute(select(clock())).scalar_one()


def _is_free(row: Row, now: datetime) -> bool:
    return row.expires <= now or is_gone(Process(row.node, row.place, row.pid, row.started))


def _holder(row: Row) -> Holder:
    return Holder(row.node, row.pid, row.acquired, row.heartbeat, row.expires)
