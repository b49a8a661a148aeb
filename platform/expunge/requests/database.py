"""The connection to SQLite or PostgreSQL: migrated when it is opened, and failing in one line."""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError
from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, NoSuchModuleError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry, NullPool

from expunge.errors import ExpungeError, InputError, StorageError, UnavailableError, first_line
from expunge.files import make_private
from expunge.requests.locks import writers
from expunge.requests.vault import Vault

HEAD = "0006"
"""The newest migration. Known without importing Alembic, so that opening a current database stays fast."""

SEALED = "0004"
"""The migration that seals the texts."""

_MIGRATIONS = Path(__file__).with_name("migrations")
_MIGRATION_LOCK = 0x45585055  # an arbitrary key for PostgreSQL's advisory lock
_DISK = ("readonly", "read-only", "full", "disk i/o", "no space", "could not extend")
_DAMAGED = ("not a database", "malformed", "no such table", "no such column")


class Database:
    """Transactions on one URL. Every failure of the driver leaves `read` and `write` as an ExpungeError.

    `patience` is how many seconds a transaction waits for a lock that another process holds, and for a server that
    does not answer. Raises InputError for a URL that is malformed, in memory, or whose driver is not installed.
    """

    def __init__(self, url: str | URL, *, patience: float = 15.0) -> None:
        self._engine = _engine(url, patience)
        self._patience = patience
        self._turn = threading.Lock()
        self.name = self._engine.url.render_as_string(hide_password=True)

    def with_patience(self, patience: float) -> "Database":
        """Another connection to the same database, with a patience of its own; to be closed by whoever asks for it."""
        return Database(self._engine.url, patience=patience)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with self._translated(), self._connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction; IntegrityError passes through, because it means a race that the caller can settle."""
        with self._translated(), self._connect() as connection:
            connection = connection.execution_options(expunge_write=True)
            with self._in_turn(), connection.begin():
                yield connection

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Lets the threads of this process write one after the other on SQLite, which is fair to nobody.

        A thread that asks SQLite again and again may find it locked until its patience ends. This only spares it that:
        SQLite's lock is what protects, so whoever has waited for long enough goes on without.
        """
        mine = self._engine.dialect.name == "sqlite" and self._turn.acquire(timeout=self._patience)
        try:
            yield
        finally:
            if mine:
                self._turn.release()

    def migrate(self, vault: Vault, runs: Path, *, exists: bool = False) -> None:
        """Brings the schema to HEAD; costs one query if it is there. Safe if several processes open at once.

        vault: seals the texts of a database that is older than SEALED, and the nights in `runs`. exists: the database
        is known to exist. Raises StorageError if it is missing or empty all the same.
        """
        file = self._engine.url.database
        if self._engine.dialect.name == "sqlite" and file and not file.startswith("file:"):
            _make_file(Path(file), exists=exists)
        with self.read() as connection:
            version = _version(connection)
            if version == HEAD:
                return
            if version is None and exists:
                raise _gone(self.name, "is empty")
        with self.write() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            if _version(connection) != HEAD:
                _upgrade(connection, self.name, vault, runs)
        if version is not None and version < SEALED:
            self.scrub()

    def scrub(self) -> None:
        """Overwrites what deleted and replaced rows have left in an SQLite file and in its log.

        PostgreSQL has no such call: there it goes with VACUUM, with the write-ahead log, and with old backups.
        """
        if self._engine.dialect.name != "sqlite":
            return
        with self._translated(), self._connect() as connection:
            driver = connection.connection.dbapi_connection
            assert driver is not None
            for statement in ("VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)"):
                driver.execute(statement).close()  # pyright: ignore[reportAttributeAccessIssue]

    def close(self) -> None:
        self._engine.dispose()

    def _connect(self) -> Connection:
        """SQLite waits for its locks itself. A server that does not answer is asked again until `patience` runs out."""
        until = time.monotonic() + self._patience
        while True:
            try:
                return self._engine.connect()
            except OperationalError:
                if self._engine.dialect.name == "sqlite" or time.monotonic() > until:
                    raise
            time.sleep(min(1.0, self._patience))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError as error:  # PostgreSQL appends the whole row, with its prompt and reason
            raise IntegrityError(error.statement, None, Exception(first_line(error.orig or error))) from None
        except UnicodeEncodeError:  # bytes of a command line that are not UTF-8
            raise InputError("what was asked for is not text", hint="write ids and names in UTF-8") from None
        except ValidationError:  # its text would quote a request
            raise StorageError(
                f"database {self.name} holds a row that cannot be read", hint="restore it from a backup"
            ) from None
        except DatabaseError as error:
            known = _known(error, self.name, self._engine.url)
            if known is None:
                raise
            raise known from None


def _engine(url: str | URL, patience: float) -> Engine:
    # Without `hide_parameters`, an error quotes prompts, reasons and external ids.
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() != "sqlite":
            timeouts = _timeouts(parsed, patience)
            return create_engine(parsed, pool_pre_ping=True, connect_args=timeouts, hide_parameters=True)
        _check_sqlite(parsed)
        # No pool: a file opens in a millisecond, and no handle is carried across a fork.
        engine = create_engine(parsed, poolclass=NullPool, connect_args={"timeout": patience}, hide_parameters=True)
    except (NoSuchModuleError, ImportError) as error:
        raise InputError(
            f"database_url: {error}", hint="install the database driver, e.g. pip install 'psycopg[binary]'"
        ) from None
    except ArgumentError:
        raise InputError(
            "database_url: not a SQLAlchemy URL", hint="write e.g. postgresql+psycopg://user@host/expunge"
        ) from None

    @event.listens_for(engine, "connect")
    def pragmas(connection: object, entry: ConnectionPoolEntry) -> None:
        # The driver would begin late and deferred; `begin` below says when, and how.
        connection.isolation_level = None  # pyright: ignore[reportAttributeAccessIssue]
        for pragma in (f"busy_timeout = {int(patience * 1000)}", "foreign_keys = ON", "secure_delete = ON"):
            connection.execute(f"PRAGMA {pragma}").close()  # pyright: ignore[reportAttributeAccessIssue]
        # The mode stays with the file. While another connection changes it, this fails at once, without waiting.
        with suppress(sqlite3.OperationalError):
            connection.execute("PRAGMA journal_mode = WAL").close()  # pyright: ignore[reportAttributeAccessIssue]

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A deferred transaction that reads, then writes, fails at once when another wrote in between: lock first.
        write = connection.get_execution_options().get("expunge_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _timeouts(url: URL, patience: float) -> dict[str, int]:
    """Timeouts of libpq, in seconds and ms: left to the system, a broken network is noticed after hours."""
    if not url.get_driver_name().startswith("psycopg"):
        return {}
    seconds = max(1, round(patience))
    options = {
        "connect_timeout": seconds,
        "keepalives_idle": seconds,
        "keepalives_interval": seconds,
        "tcp_user_timeout": 1000 * seconds,
    }
    return {name: value for name, value in options.items() if name not in url.query}


def _check_sqlite(url: URL) -> None:
    path = url.database
    if path in (None, "", ":memory:") or "mode=memory" in url.render_as_string():
        raise InputError(
            "database_url: a database in memory forgets every request",
            hint="name a file, e.g. sqlite:////var/lib/expunge.db",
        )
    if path.startswith("file:"):
        return
    try:
        make_private(Path(path).parent)
    except OSError as error:
        raise StorageError(
            f"{Path(path).parent} cannot be made ({error.strerror})", hint="check EXPUNGE_HOME"
        ) from None


def _make_file(path: Path, *, exists: bool) -> None:
    """Make the file before SQLite does, which would let others read it. SQLite's companion files take over its mode."""
    if exists and not (path.exists() and path.stat().st_size):
        raise _gone(str(path), "is empty" if path.exists() else "does not exist")
    with suppress(OSError):  # SQLite says what is wrong with it
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def _gone(name: str, what: str) -> StorageError:
    return StorageError(
        f"database {name} {what}, but this home has accepted requests into it",
        hint="restore it from a backup, or correct EXPUNGE_DATABASE_URL; to start over, use a new EXPUNGE_HOME",
    )


def _known(error: DatabaseError, name: str, url: URL) -> ExpungeError | None:
    """Translates what the operator can fix; None for a mistake in this program."""
    reason = " ".join(str(error.orig).split())
    if any(word in reason.lower() for word in _DISK):
        return StorageError(
            f"database {name} cannot be written ({reason})", hint="free space or check its permissions, then repeat"
        )
    if any(word in reason.lower() for word in _DAMAGED):
        return StorageError(f"database {name} is damaged ({reason})", hint="restore it from a backup")
    if "locked" in reason:
        by = writers(Path(url.database)) if url.database else []
        return UnavailableError(
            f"database {name} is locked by {', '.join(by) or 'another process'}", hint="wait for it, then repeat"
        )
    if "unable to open" in reason:  # what SQLite says of a folder that cannot be written
        return StorageError(
            f"database {name} cannot be opened ({reason})", hint="check that its folder exists and can be written"
        )
    if isinstance(error, OperationalError):
        return UnavailableError(
            f"database {name} does not answer ({reason})", hint="check EXPUNGE_DATABASE_URL and that it runs"
        )
    return None


def _version(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _upgrade(connection: Connection, name: str, vault: Vault, runs: Path) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes.update(connection=connection, vault=vault, runs=runs)
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise StorageError(
            f"database {name} was made by another version of expunge ({error})", hint="upgrade expunge"
        ) from None
