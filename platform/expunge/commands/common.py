"""What all commands share: opening the platform, printing, and failing."""

import json
import math
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from expunge.errors import ExpungeError
from expunge.text import masked_quote, visible

if TYPE_CHECKING:
    from rich.table import Table

    from expunge.requests.blobs import BlobStore
    from expunge.requests.store import RequestStore
    from expunge.settings import Settings

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, also for errors.")]
NamedVersion = Annotated[
    str, typer.Argument(metavar="MODEL[@VERSION]", help="A model, and a version or an alias (default: champion).")
]


@dataclass(frozen=True)
class Opened:
    """The settings and stores that a command works with."""

    settings: "Settings"
    store: "RequestStore"
    blobs: "BlobStore"


def hush_libraries() -> None:
    """Keep transformers from saying on import that it does without torchvision, which nothing here needs."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@contextmanager
def libraries_on_stderr() -> Iterator[None]:
    """Hush libraries, and send what some of them log to stdout to stderr: stdout holds the command's answer alone."""
    hush_libraries()
    with redirect_stdout(sys.stderr):
        yield


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
    """Print one JSON document; dates and enums become text, and unprintable characters become escapes."""
    typer.echo(_json(value))


def print_json_list(values: Iterable[object]) -> None:
    """Print one JSON array item by item, because it may not fit into memory."""
    written = False
    for value in values:
        typer.echo(("," if written else "[") + "\n" + textwrap.indent(_json(value), "  "), nl=False)
        written = True
    typer.echo("\n]" if written else "[]")


def _json(value: object) -> str:
    ascii_only = (sys.stdout.encoding or "").lower() not in ("utf-8", "utf8")
    text = json.dumps(_finite(value), indent=2, ensure_ascii=ascii_only, default=str)
    return text if text.isascii() else _UNPRINTABLE.sub(_escape, text)


_UNPRINTABLE = re.compile(r"[^\x00-\x7e]")


def _escape(found: re.Match[str]) -> str:
    """Escape a character inside a JSON string; the rest of a document is ASCII."""
    return found.group() if found.group().isprintable() else json.dumps(found.group())[1:-1]


def _finite(value: object) -> object:
    """Replace infinities and NaN, which JSON does not have, with null."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
        case _:
            return value


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[object]], *, header: bool = True) -> None:
    """Print a table without a frame; None becomes an empty cell."""
    from rich.table import Table

    table = Table(*columns, box=None, show_header=header)
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    print_table(table)


def print_table(table: "Table") -> None:
    """Print a table as wide as its content: a terminal may wrap it, but ids and values stay whole to be copied.

    Control characters in a cell are escaped, so that each cell stays in its place.
    """
    from rich.console import Console
    from rich.measure import Measurement

    for column in table.columns:
        column._cells = [visible(cell) if isinstance(cell, str) else cell for cell in column._cells]
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
    """Turn an unforeseen failure into one line; the traceback is printed only at log level debug."""
    if os.environ.get("EXPUNGE_LOG_LEVEL", "").lower() == "debug":
        typer.echo(masked_quote("".join(traceback.format_exception(error))), err=True, nl=False)
    detail = one_line(masked_quote(str(error))) or "no message"
    return ExpungeError(f"{type(error).__name__}: {detail}", hint="set EXPUNGE_LOG_LEVEL=debug for the traceback")


def one_line(text: object) -> str:
    """Make outside text safe to print: nothing in it can break the line or control the terminal."""
    return visible(str(text)).strip()
