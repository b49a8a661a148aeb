"""Finds out who holds a SQLite file, which the database itself does not tell."""

from contextlib import suppress
from pathlib import Path

import psutil

_LOCKS = Path("/proc/locks")


def writers(database: Path) -> list[str]:
    """Names the processes that hold a write lock on `database`, as `python3 (pid 17)`, if the system tells.

    Linux lists every lock with its process and its file's inode. In the mode that we use, the lock lies on the file's
    `-shm` companion.
    """
    inodes = set()
    for path in (database, database.with_name(f"{database.name}-shm")):
        with suppress(OSError):
            inodes.add(path.stat().st_ino)
    try:
        listed = [line.split() for line in _LOCKS.read_text().splitlines()]
    except OSError:
        return []
    # 1: POSIX  ADVISORY  WRITE 17 08:01:131 120 120 ("->" before the kind: it waits for the lock)
    held = [fields for fields in listed if len(fields) > 5 and fields[1] != "->" and fields[3] == "WRITE"]
    pids = {int(fields[4]) for fields in held if int(fields[5].rpartition(":")[2]) in inodes}
    return [_named(pid) for pid in sorted(pids)]


def _named(pid: int) -> str:
    try:
        return f"{psutil.Process(pid).name()} (pid {pid})"
    except psutil.Error:
        return f"a process in another container (pid {pid})"
