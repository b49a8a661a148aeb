"""`expunge config show` and `expunge version`."""

import json
import os
from collections.abc import Iterator

import typer

from expunge.commands.common import AsJson, one_line, open_settings, print_json, print_rows
from expunge.text import masked

app = typer.Typer(help="Show the settings.", rich_markup_mode=None, no_args_is_help=True)

_SECRETS = frozenset({"blob_key", "secret"})


@app.callback()
def config() -> None:
    """Show the settings."""


@app.command("show")
def show(as_json: AsJson = False) -> None:
    """Print every setting, its value and its source. Secrets are masked."""
    from expunge.sources import config_file, read_config

    settings = open_settings()
    file, written = config_file(), read_config()
    rows = [
        {"name": ".".join(path), "value": without_secrets(path, value), "source": source(path, written)}
        for path, value in leaves(settings.model_dump(mode="json"))
    ]
    derived = {"database": settings.database, "blobs": settings.blobs, "tracking": settings.tracking}
    rows += [{"name": f"({k})", "value": without_secrets((k,), v), "source": "in force"} for k, v in derived.items()]
    if as_json:
        print_json({"config_file": str(file), "exists": file.is_file(), "settings": rows})
        return
    print_rows(("setting", "value", "source"), [(row["name"], _shown(row["value"]), row["source"]) for row in rows])
    typer.echo(f"config file: {one_line(file)}{'' if file.exists() else ' (none)'}")


def _shown(value: object) -> object:
    """Spell a list, a table or a truth value as a config file or a variable takes it."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict | bool) else value


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
    """Yield every setting that holds a value rather than a table; an empty table counts as a value."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, str(key)))
    else:
        yield path, value


def without_secrets(path: tuple[str, ...], value: object) -> object:
    if path[-1] in _SECRETS and value:
        return "***"
    if isinstance(value, list):
        return [without_secrets(path, item) for item in value]
    return masked(value) if isinstance(value, str) else value


def source(path: tuple[str, ...], written: dict[str, object]) -> str:
    """Say where a setting comes from: the most specific variable wins, and variables win over the file."""
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
