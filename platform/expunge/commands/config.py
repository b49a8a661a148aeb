"""`expunge config show` and `expunge version`."""

import os
import re
import tomllib
from collections.abc import Iterator

import typer

from expunge.commands.common import AsJson, open_settings, print_json, print_table

app = typer.Typer(help="The settings in force.", rich_markup_mode=None, no_args_is_help=True)

_SECRETS = frozenset({"blob_key"})
_PASSWORD = re.compile(r"(?<=://)([^/@:\s]*):[^@\s]*(?=@)")


@app.callback()
def config() -> None:
    """The settings in force."""


@app.command("show")
def show(as_json: AsJson = False) -> None:
    """Print every setting, its value and where it came from. Secrets are masked."""
    from expunge.settings import config_file

    settings = open_settings()
    file = config_file()
    written = tomllib.loads(file.read_text("utf-8")) if file.is_file() else {}
    rows = [
        {"name": ".".join(path), "value": masked(path, value), "source": source(path, written)}
        for path, value in leaves(settings.model_dump(mode="json"))
    ]
    derived = {"database": settings.database, "blobs": settings.blobs, "tracking": settings.tracking}
    rows += [{"name": f"({k})", "value": masked((k,), v), "source": "in force"} for k, v in derived.items()]
    if as_json:
        print_json({"config_file": str(file), "exists": file.is_file(), "settings": rows})
        return
    from rich.table import Table

    table = Table("setting", "value", "source", box=None)
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row.values()))
    print_table(table)
    typer.echo(f"config file: {file}{'' if file.is_file() else ' (none)'}")


def version(as_json: AsJson = False) -> None:
    """Print the version."""
    if as_json:
        print_json({"version": installed_version()})
    else:
        typer.echo(f"expunge {installed_version()}")


def installed_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("expunge")
    except PackageNotFoundError:
        return "unknown (not installed)"


def leaves(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Every setting that holds a value of its own; an empty table counts as one."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, str(key)))
    else:
        yield path, value


def masked(path: tuple[str, ...], value: object) -> object:
    if path[-1] in _SECRETS and value:
        return "***"
    return _PASSWORD.sub(r"\1:***", value) if isinstance(value, str) else value


def source(path: tuple[str, ...], written: dict[str, object]) -> str:
    """The most specific wins within the environment, and the environment wins over the file."""
    environment = {name.upper() for name in os.environ}
    for length in range(len(path), 0, -1):
        name = "EXPUNGE_" + "__".join(path[:length]).upper()
        if name in environment:
            return f"environment ({name})"
    here: object = written
    for part in path:
        if not isinstance(here, dict) or part not in here:
            return "default"
        here = here[part]
    return "config file"
