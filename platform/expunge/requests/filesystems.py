"""A folder on any durable file system: what is written is whole, and outlives this process."""

import contextlib
import re
from pathlib import Path
from typing import cast

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from expunge.errors import InputError
from expunge.files import write_atomically, write_once

# The protocols of fsspec that keep what they are given. Others forget it (memory), cannot write (http, zip, data), or
# are a layer over another one (dir, simplecache).
DURABLE = frozenset(
    {
        *("file", "local", "ftp", "sftp", "smb", "ssh", "webdav"),
        *("abfs", "adl", "arrow_hdfs", "az", "dbfs", "gcs", "gs", "hdfs", "oci", "ocilake", "oss"),
        *("s3", "s3a", "tos", "tosfs", "webhdfs"),
    }
)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class Folder:
    """The folder of a local path or fsspec URL; names are relative to it. It need not exist, and writing makes it.

    Raises InputError, beginning with `setting`, for a URL that keeps nothing or whose driver is missing. Methods raise
    OSError.
    """

    def __init__(self, url: str, setting: str = "blob_url") -> None:
        self._fs, self._root = _open(url, setting)
        self._local = isinstance(self._fs, LocalFileSystem)

    def read(self, name: str) -> bytes:
        return cast(bytes, self._fs.cat_file(self._path(name)))

    def write(self, name: str, data: bytes) -> None:
        """Replaces what is there. A reader sees the old file or the new one."""
        if self._local:
            write_atomically(Path(self._path(name)), data)
        else:
            self._fs.pipe_file(self._path(name), data)  # an object store shows an object whole or not at all

    def write_once(self, name: str, data: bytes) -> bytes:
        """Writes only where nothing is there; returns what is there afterwards, whoever wrote it."""
        if self._local:
            write_once(Path(self._path(name)), data)
        elif not self.has(name):
            try:
                self._fs.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                pass
            except (OSError, TypeError, ValueError, NotImplementedError):  # a store without conditional writes
                self._fs.pipe_file(self._path(name), data)
        return self.read(name)

    def copy(self, name: str, to: str) -> None:
        self._fs.cp_file(self._path(name), self._path(to))

    def has(self, name: str) -> bool:
        return bool(self._fs.exists(self._path(name)))

    def delete(self, name: str) -> None:
        """Deletes the file; it is no error if there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def names(self) -> list[str]:
        """Returns the name of every file in the folder and below, sorted."""
        self._fs.invalidate_cache()
        if not self._fs.exists(self._root):
            return []
        found = cast(list[str], self._fs.find(self._root))
        return sorted(str(path).removeprefix(self._root).lstrip("/") for path in found)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def _open(url: str, setting: str) -> tuple[fsspec.AbstractFileSystem, str]:
    scheme, separator, _ = url.partition("://")
    if not separator:
        # fsspec would take a path that holds `::` for a chain of file systems.
        if _SCHEME.match(url):
            raise InputError(f"{setting}: neither a path nor a URL", hint="write e.g. s3://bucket/prefix")
        return LocalFileSystem(), str(Path(url).expanduser().resolve())
    if "::" in scheme or (scheme in known_implementations and scheme not in DURABLE):
        raise InputError(
            f"{setting}: {scheme}:// does not keep what is written to it",
            hint="use a local path or an object store, e.g. s3://bucket/prefix",
        )
    try:
        fs, root = url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"{setting}: {error}", hint="install the driver or use a local path") from None
    return cast(fsspec.AbstractFileSystem, fs), str(root).rstrip("/")
