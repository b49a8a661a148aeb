"""The embedded MLflow database: made at once and whole, and never changed by another MLflow without a backup.

MLflow makes its tables in place, one migration after the other. Two processes that do so at the same time both fail,
and what they leave cannot be used; so the file is made aside and linked into place. MLflow would also bring an older
file up to date without being asked, which cannot be undone.
"""

import os
import shlex
import shutil
import sqlite3
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote

from expunge.errors import UnavailableError


def ensure_database(file: Path) -> None:
    """Make the database, or check that this MLflow is the one that it is for.

    Raises UnavailableError if it is another's, and whatever MLflow raises while it makes one.
    """
    if not file.exists():
        _make(file)
        return
    found = _schema(file)
    if found is None:  # empty, or no database of MLflow's: it says so itself
        return
    head, known = _schemas()
    if found != head:
        raise _of_another(file, found, known)


def _make(file: Path) -> None:
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as temporary:
        made, copy = Path(temporary) / "made.db", Path(temporary) / "copy.db"
        MlflowClient(tracking_uri=f"sqlite:///{quote(str(made))}").search_experiments(max_results=1)
        shutil.copyfile(made, copy)  # MLflow keeps the other one open
        with suppress(OSError):  # another process was faster; or there are no links here, and MLflow makes it in place
            os.link(copy, file)


def _schema(file: Path) -> str | None:
    """Return the revision of the tables; None if there is none, or if they cannot be read."""
    try:
        with closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True)) as connection:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error:
        return None
    return None if row is None else str(row[0])


def _schemas() -> tuple[str | None, frozenset[str]]:
    """Return the revision that this MLflow works with, and all that it knows."""
    import mlflow
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    return scripts.get_current_head(), frozenset(each.revision for each in scripts.walk_revisions())


def _of_another(file: Path, found: str, known: frozenset[str]) -> UnavailableError:
    what = f"MLflow's database {file} was made by "
    if found not in known:
        return UnavailableError(f"{what}a newer MLflow (schema {found})", hint="upgrade mlflow here to that release")
    here, backup = shlex.quote(str(file)), shlex.quote(f"{file}.{found}")
    uri = shlex.quote(f"sqlite:///{quote(str(file))}")
    return UnavailableError(
        f"{what}an older MLflow (schema {found})",
        hint=f"while nothing runs, make a backup, `cp {here} {backup}`, then run `mlflow db upgrade {uri}`",
    )
