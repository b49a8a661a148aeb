"""A backup of what cannot be made again: the request store and the sealed images, with or without their key.

A folder: `expunge.db`, `blobs/` as they lie (sealed), `key.sealed` if a passphrase is given, and last `manifest.json`
with a checksum of each. A key in clear beside what it seals would undo the sealing, so it is sealed with the
passphrase or left out. Not in it: `runs/` (a night makes it again), config.toml, and MLflow, which has its own backup.
"""

import contextlib
import secrets
import shutil
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, cast

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy import make_url

from expunge.errors import ExpungeError, InputError, StorageError
from expunge.files import file_digest, write_atomically
from expunge.requests import passphrase as passphrases
from expunge.requests.blobs import open_blobs
from expunge.requests.database import HEAD
from expunge.settings import Settings

MANIFEST, DATABASE, BLOBS, KEY = "manifest.json", "expunge.db", "blobs", "key.sealed"
_MAY_BE_THERE = frozenset({"config.toml"})


class Manifest(BaseModel):
    """What a backup holds; it is written last, so a folder without one is no backup."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    created: datetime
    migration: str
    requests: int
    blobs: int
    key: bool
    files: dict[str, str]
    """Path in the folder: SHA-256 in hex."""


def back_up(settings: Settings, target: Path, passphrase: str | None = None) -> Manifest:
    """Write a backup to the new folder `target`; requests may be accepted meanwhile.

    Raises InputError for a target that exists or lies in the home, a short passphrase, and a database other than
    SQLite; StorageError where something cannot be read or written, and then nothing is left at `target`.
    """
    source = _sqlite_file(settings, "back it up with `pg_dump --format=custom`, and the bucket with its own versions")
    if passphrase is not None:
        passphrases.check(passphrase)
    target = target.absolute()
    if target.exists():
        raise InputError(f"backup: {target} exists", hint="name a new folder")
    if target.is_relative_to(settings.home.absolute()):
        raise InputError(f"backup: {target} lies in the home, and would be lost with it", hint="name another disk")
    partial = target.with_name(f".{target.name}.{secrets.token_hex(6)}.partial")
    with _storage(f"the backup at {target}"):
        partial.mkdir(parents=True, mode=0o700)
        try:
            # The rows first: a picture is stored before its row, so that every row's pictures are there to follow.
            requests = _copy_database(source, partial / DATABASE)
            blobs = _copy_blobs(settings.blobs, str(partial / BLOBS))
            if passphrase is not None:
                write_atomically(partial / KEY, passphrases.seal(_key_text(settings), passphrase, KEY))
            files = {str(path.relative_to(partial)): file_digest(path) for path in _files(partial)}
            manifest = Manifest(
                created=datetime.now(UTC),
                migration=HEAD,
                requests=requests,
                blobs=blobs,
                key=passphrase is not None,
                files=files,
            )
            write_atomically(partial / MANIFEST, manifest.model_dump_json(indent=2).encode())
            partial.replace(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return manifest


def restore(settings: Settings, source: Path, passphrase: str | None = None) -> Manifest:
    """Bring a backup into an empty home (config.toml may be there).

    Raises InputError for a home or blob store that holds something, or a wrong passphrase; StorageError for a backup
    that is incomplete, altered, or does not open with the key at hand; then nothing is written.
    """
    target = _sqlite_file(settings, "restore it with `pg_restore`, and the bucket from its own versions")
    manifest = _checked(source)
    if manifest.migration > HEAD:
        raise StorageError(f"the backup is of a newer expunge (migration {manifest.migration})", hint="upgrade expunge")
    _check_empty(settings, target)
    key = None
    if passphrase is not None:
        if not manifest.key:
            raise InputError("passphrase: the backup holds no key", hint="leave it out, and set EXPUNGE_BLOB_KEY")
        key = passphrases.unseal((source / KEY).read_bytes(), passphrase, KEY)
        if settings.blob_key and settings.blob_key.strip() != key:
            raise InputError("EXPUNGE_BLOB_KEY is another key than the backup's", hint="unset it, or leave the key out")
    _check_opens(settings, source, manifest, key or settings.blob_key)
    with _storage(f"the home {settings.home}"):
        settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        if key is not None and not settings.blob_key:
            write_atomically(settings.home / "blob.key", f"{key}\n".encode())
        _copy_blobs(str(source / BLOBS), settings.blobs)
        write_atomically(target, (source / DATABASE).read_bytes())  # last: a row never lacks its pictures
    return manifest


def _sqlite_file(settings: Settings, hint: str) -> Path:
    url = make_url(settings.database)
    if url.get_backend_name() != "sqlite":
        raise InputError(f"database_url: {url.get_backend_name()} is not backed up from here", hint=hint)
    if not url.database or url.database.startswith("file:"):
        raise InputError("database_url: not a plain SQLite file", hint="write e.g. sqlite:////var/lib/expunge.db")
    return Path(url.database)


def _copy_database(source: Path, target: Path) -> int:
    """By SQLite's own backup: one consistent state, whoever writes meanwhile. Returns the number of requests."""
    if not source.is_file():
        raise StorageError(f"database {source} does not exist", hint="check EXPUNGE_HOME and EXPUNGE_DATABASE_URL")
    target.touch(mode=0o600)
    reader = sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True, timeout=15)
    with contextlib.closing(reader), contextlib.closing(sqlite3.connect(target)) as copy:
        reader.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")  # one file, without a log beside it
        (state,) = copy.execute("PRAGMA integrity_check").fetchone()
        if state != "ok":
            raise StorageError(f"database {source} is damaged ({state})", hint="restore it from an earlier backup")
        return copy.execute("SELECT count(*) FROM requests").fetchone()[0]


def _copy_blobs(source: str, target: str) -> int:
    """Sealed as they lie, from any fsspec URL to any other. Returns their number."""
    (reader, root), (writer, there) = _filesystem(source), _filesystem(target)
    found = _blobs_in(source)
    for path in found:
        copy = f"{there}/{path.removeprefix(root).lstrip('/')}"
        data = cast(bytes, reader.cat_file(path))
        if isinstance(writer, LocalFileSystem):
            write_atomically(Path(copy), data)
        else:
            writer.pipe_file(copy, data)
    return len(found)


def _blobs_in(url: str) -> list[str]:
    filesystem, root = _filesystem(url)
    if not filesystem.exists(root):
        return []
    names = (str(path) for path in filesystem.find(root))
    return sorted(name for name in names if len(name.rpartition("/")[2]) == 64)


def _filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    filesystem, root = url_to_fs(url)
    return filesystem, str(root).rstrip("/")


def _key_text(settings: Settings) -> str:
    if settings.blob_key:
        return settings.blob_key.strip()
    file = settings.home / "blob.key"
    if not file.is_file():
        raise StorageError(f"{file} does not exist: there is no key to back up", hint="leave the passphrase out")
    return file.read_text("ascii").strip()


def _checked(source: Path) -> Manifest:
    try:
        manifest = Manifest.model_validate_json((source / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not of this version"
        raise InputError(
            f"{source} is no backup ({MANIFEST}: {reason})", hint="name a folder that backup made"
        ) from None
    for name, digest in manifest.files.items():
        path = source / name
        if ".." in Path(name).parts or not path.is_file() or file_digest(path) != digest:
            raise StorageError(f"the backup {source} was altered: {name}", hint="use another one")
    return manifest


def _check_empty(settings: Settings, database: Path) -> None:
    there = (
        [path for path in settings.home.glob("*") if path.name not in _MAY_BE_THERE] if settings.home.exists() else []
    )
    hint = "restore into a new EXPUNGE_HOME"
    if there:
        raise InputError(f"home: {settings.home} holds {there[0].name}", hint=hint)
    if database.exists():
        raise InputError(f"database_url: {database} exists", hint=hint)
    if _blobs_in(settings.blobs):
        raise InputError(f"blob_url: {settings.blobs} holds blobs", hint="restore into an empty one")


def _check_opens(settings: Settings, source: Path, manifest: Manifest, key: str) -> None:
    """Every blob is named by what is in it: one that opens proves the key."""
    blobs = sorted(Path(name).name for name in manifest.files if name.startswith(f"{BLOBS}/"))
    if blobs and key:
        there = settings.model_copy(update={"blob_url": str(source / BLOBS), "blob_key": key})
        open_blobs(there).get(blobs[0])


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


@contextlib.contextmanager
def _storage(what: str) -> Iterator[None]:
    try:
        yield
    except ExpungeError:
        raise
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise StorageError(f"{what} cannot be written ({reason})", hint="free space, then repeat") from None
