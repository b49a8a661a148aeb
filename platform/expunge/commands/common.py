"""What every command shares: how it opens the platform, how it prints, how it fails."""

import json
import os
import sys
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.errors import ExpungeError

if TYPE_CHECKING:
    from rich.table import Table

    from expunge.requests.blobs import BlobStore
    from expunge.requests.store import RequestStore
    from expunge.settings import Settings

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, errors too.")]


@dataclass(frozen=True)
class Opened:
    """The platform as a command needs it."""

    settings: "Settings"
    store: "RequestStore"
    blobs: "BlobStore"


def open_settings() -> "Settings":
    from expunge.logs import configure
    from expunge.settings import load_settings

    settings = load_settings()
    configure(settings.log_level)
    return settings


def open_store() -> "RequestStore":
    from expunge.requests import store

    return store.open_store(open_settings())


def open_platform() -> Opened:
    from expunge.requests import blobs, store

    settings = open_settings()
    return Opened(settings, store.open_store(settings), blobs.open_blobs(settings))


def print_json(value: object) -> None:
    """One JSON document on stdout; dates and enums as their text."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(table: "Table") -> None:
    """As wide as its content: a terminal may wrap a line, but no id or value is cut: they are copied."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(markup=False, highlight=False, emoji=False)
    unbounded = console.options.update(width=10_000)
    console.width = Measurement.get(console, unbounded, table).maximum
    console.print(table)


def print_error(error: ExpungeError, *, as_json: bool) -> None:
    if as_json:
        print_json({"error": error.message, "hint": error.hint, "exit_code": error.exit_code})
    else:
        typer.echo(f"error: {one_line(str(error))}", err=True)


def unexpected(error: Exception) -> ExpungeError:
    """A failure that nobody foresaw, as one line; the traceback is for those who ask."""
    if os.environ.get("EXPUNGE_LOG_LEVEL", "").lower() == "debug":
        traceback.print_exception(error, file=sys.stderr)
    detail = one_line(str(error)) or "no message"
    return ExpungeError(f"{type(error).__name__}: {detail}", hint="set EXPUNGE_LOG_LEVEL=debug for the traceback")


def one_line(text: str) -> str:
    """Paths and messages come from outside: nothing in them may break the line or steer the terminal."""
    return "".join(c if c.isprintable() else " " if c in "\n\r\t" else f"\\x{ord(c):02x}" for c in text).strip()
