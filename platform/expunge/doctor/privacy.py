"""Checks whether other users of this machine may read what people have sent."""

import shlex
import stat
from pathlib import Path

from expunge.doctor.check import Check
from expunge.doctor.services import file_of
from expunge.settings import Settings
from expunge.sources import config_file


def privacy(settings: Settings) -> Check:
    """Prompts, reasons and pictures of people are in these, and in the config file perhaps passwords."""
    home = settings.home
    paths = [home, settings.runs, home / "mlflow", home / "blob.key", config_file()]
    for url in (settings.database, settings.tracking):
        if url.startswith("sqlite:///"):
            paths.append(file_of(url))
    shared = [path for path in dict.fromkeys(path.absolute() for path in paths) if _is_shared(path, home)]
    if home in shared and (home.parent == home or home.stat().st_mode & stat.S_ISVTX):
        hint = "set EXPUNGE_HOME to a folder of its own"  # to close /, or /tmp, would stop the machine
    else:
        hint = "; ".join(f"chmod {'700' if path.is_dir() else '600'} {shlex.quote(str(path))}" for path in shared)
    found = f"others may read {', '.join(map(str, shared))}" if shared else "only you can read what is there"
    return Check("privacy", not shared, found, hint, required=False)


def _is_shared(path: Path, home: Path) -> bool:
    """True if the group or others may read it. A folder in the home that is closed to them closes what is in it."""
    inside = [folder for folder in path.parents if folder.is_relative_to(home)]
    return (path.is_file() or path.is_dir()) and all(each.stat().st_mode & 0o077 for each in (path, *inside))
