"""Writes files that only their owner can read, that nobody ever sees half-written, and that survive a power cut."""

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_LINKS = (errno.EPERM, errno.ENOTSUP)  # raised by a file system without hard links


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a file of mode 0600, whole or not at all; missing folders are created with mode 0700.

    A reader sees the old file or the new one, even after a kill or a power cut in the middle. Raises OSError.
    """
    with _neighbour(path) as new:
        write_new(new, data)
        move_into_place(new, path)


def write_once(path: Path, data: str | bytes) -> None:
    """Write a file of mode 0600 unless it exists; if several processes try, one succeeds. Raises OSError."""
    if path.exists():
        return
    with _neighbour(path) as new, contextlib.suppress(FileExistsError):
        write_new(new, data)
        try:
            os.link(new, path)
            _sync_folder(path.parent)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            write_new(path, data)


def write_new(path: Path, data: str | bytes) -> None:
    """Write a file of mode 0600 and wait until the disk has it. Raises FileExistsError if it exists, or OSError."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def move_into_place(source: Path, target: Path) -> None:
    """Rename a file or folder, and wait until the disk has the new name. Raises OSError."""
    source.replace(target)
    _sync_folder(target.parent)


def make_private(folder: Path) -> None:
    """Create `folder` and its missing parents with mode 0700; existing ones keep their mode. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True, mode=0o700)
    folder.mkdir(exist_ok=True)  # raises if a file is in the way


def file_digest(path: Path) -> str:
    """Return the SHA-256 of the file's content, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _neighbour(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside `path` to write to first; delete it afterwards."""
    make_private(path.parent)
    new = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield new
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Sync a folder, so that a new name in it reaches the disk; some file systems do not allow it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
