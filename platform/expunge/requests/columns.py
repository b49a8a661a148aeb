"""Types of columns, and the database's clock: the same Python values on SQLite and on PostgreSQL."""

from datetime import UTC, datetime

from sqlalchemy import DateTime, String
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator

from expunge.errors import StorageError
from expunge.types import RequestState


class UtcDateTime(TypeDecorator[datetime]):
    """Stores UTC and reads it as such, since SQLite forgets time zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


class State(TypeDecorator[RequestState]):
    """Stores a state by its value: some drivers would store the name."""

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
