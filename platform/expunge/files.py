"""Four habits with files: only their owner reads them, nobody ever sees half of one, a lock ends with its process, a
digest reads in pieces."""

import contextlib
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a file of mode 0600, whole or not at all, in folders that are made with mode 0700 where they are missing.

    A reader sees the old file or the new one, also after a kill or a power cut in the middle. Raises OSError.
    """
    make_private(path.parent)
    neighbour = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        write_new(neighbour, data)
        neighbour.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            neighbour.unlink(missing_ok=True)
        raise


def write_new(path: Path, data: str | bytes) -> None:
    """Write a file of mode 0600 to the disk itself. Raises FileExistsError where there is one, OSError."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def make_private(folder: Path) -> None:
    """Make `folder` and its missing parents, each with mode 0700; what exists keeps its mode. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True, mode=0o700)
    folder.mkdir(exist_ok=True)  # says so where a file is in the way


def file_digest(path: Path) -> str:
    """SHA-256, in hexadecimal, of what is in it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold `path` for this process, however that ends. Without `wait`, raises BlockingIOError where it is held."""
    make_private(path.parent)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def _sync_folder(folder: Path) -> None:
    """The rename itself has to reach the disk, too; not every file system lets a folder be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
