"""A home remembers the database and the sealing key that it was made with: a missing or a wrong one is noticed.

`home.json` holds ids only. The home's own id travels with a night: its submitter, driver and workers each read settings
of their own, and a night that ran on another home would find no request there and call that a success.
"""

import secrets
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from expunge.errors import InputError, StorageError
from expunge.files import write_atomically, write_once
from expunge.settings import Settings
from expunge.types import Value

FILE = "home.json"


class Home(Value):
    """The document on disk. `database` is the id inside the database, `key` the fingerprint of the sealing key."""

    version: Literal[1] = 1
    id: str
    database: str | None = None
    key: str | None = None


def recall(settings: Settings) -> Home | None:
    """Reads what the home remembers; None if nothing was made in it yet. Raises StorageError if it cannot be read."""
    file = settings.home / FILE
    try:
        return Home.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise StorageError(f"home {settings.home} is not a folder", hint="correct EXPUNGE_HOME") from None
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged, or of a newer version"
        raise StorageError(f"{file} cannot be read ({reason})", hint="restore it, or upgrade expunge") from None


def remember(settings: Settings, *, database: str | None = None, key: str | None = None) -> Home:
    """Note a database or a key that the home does not know yet.

    Raises StorageError where the home was made with another one, or cannot be written.
    """
    while True:
        known = recall(settings)
        if known is not None and _knows(known, settings.home, database, key):
            return known
        # Other processes may write at the same time. Only one of them creates the file; if two add to it, the one whose
        # addition was overwritten finds that out on the next round, and adds it again.
        try:
            if known is None:
                made = Home(id=secrets.token_hex(8), database=database, key=key)
                write_once(settings.home / FILE, _text(made))
            else:
                added = {"database": known.database or database, "key": known.key or key}
                write_atomically(settings.home / FILE, _text(known.model_copy(update=added)))
        except OSError as error:
            reason = error.strerror or str(error)
            raise StorageError(
                f"home {settings.home} cannot be written ({reason})", hint="check EXPUNGE_HOME"
            ) from None


def check_home(settings: Settings, expected: str) -> None:
    """Raises InputError if this process's home is not the one whose id it was sent."""
    known = recall(settings)
    if known is None or known.id != expected:
        what = "nothing was ever accepted into it" if known is None else f"its id is {known.id}, not {expected}"
        raise InputError(
            f"home {settings.home} is not the home that this night was submitted from: {what}",
            hint="set EXPUNGE_HOME to one shared folder where commands run and where Ray's nodes are started",
        )


def _text(home: Home) -> str:
    return home.model_dump_json(indent=2) + "\n"


def _knows(known: Home, home: Path, database: str | None, key: str | None) -> bool:
    """True if the home knows what is given. Raises StorageError if it knows another one."""
    for what, mine, given in (("database", known.database, database), ("sealing key", known.key, key)):
        if mine and given and mine != given:
            raise StorageError(
                f"the {what} in the settings is not the one that home {home} was made with",
                hint="correct the settings, or use a new EXPUNGE_HOME",
            )
    return (database is None or known.database is not None) and (key is None or known.key is not None)
