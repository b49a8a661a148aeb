"""Backs up what cannot be made again: the request store and the sealed images, with or without their key.

A folder: `expunge.db`, `blobs/` as they lie (sealed), `key.sealed` if a passphrase is given, and last `manifest.json`
with a checksum of each, signed with the sealing key. Every blob is opened on the way, so that what is restored is
whole. A key in the clear beside what it seals would undo the sealing, so it is sealed with the passphrase or left out.
Not included: `runs/` (a night makes it again), config.toml, and MLflow, which has its own backup.
"""

import contextlib
import secrets
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError
from sqlalchemy import make_url

from expunge.errors import ExpungeError, InputError, NotFoundError, StorageError
from expunge.files import file_digest, move_into_place, write_atomically
from expunge.requests import passphrase as passphrases
from expunge.requests.blobs import KEY_FILE, BlobStore, mark, open_blobs, sealing_key
from expunge.requests.database import HEAD
from expunge.requests.filesystems import Folder
from expunge.requests.home import recall
from expunge.requests.inventory import NEEDED
from expunge.requests.manifest import BLOBS, DATABASE, KEY, MANIFEST, Manifest
from expunge.requests.store import open_store
from expunge.requests.vault import Vault
from expunge.settings import Settings
from expunge.types import RemovalRequest


def back_up(
    settings: Settings, target: Path, passphrase: str | None = None, *, allow_damaged: bool = False
) -> Manifest:
    """Write a backup to the new folder `target`; requests may be accepted meanwhile.

    allow_damaged: go on if blobs do not open or requests lack pictures; the manifest then names them.

    Raises InputError for a target that exists or lies in the home, a short passphrase, and a database other than
    SQLite; StorageError if something cannot be read or written or is damaged; then nothing is left at `target`.
    """
    source = sqlite_file(settings, "back it up with `pg_dump --format=custom`, and the bucket with its own versions")
    if passphrase is not None:
        passphrases.check(passphrase)
    target = target.absolute()
    if target.exists():
        raise InputError(f"backup: {target} exists", hint="name a new folder")
    if target.is_relative_to(settings.home.absolute()):
        raise InputError(f"backup: {target} lies in the home, and would be lost with it", hint="name another disk")
    if recall(settings) is not None:
        open_store(settings).close()  # refuses a database that is gone: its backup would be an empty one
    partial = target.with_name(f".{target.name}.{secrets.token_hex(6)}.partial")
    with storage(f"the backup at {target}"):
        partial.mkdir(parents=True, mode=0o700)
        try:
            manifest = _fill(settings, source, partial, passphrase)
            if not allow_damaged:
                _check_whole(manifest)
            write_atomically(partial / MANIFEST, manifest.model_dump_json(indent=2).encode())
            move_into_place(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return manifest


def _fill(settings: Settings, source: Path, folder: Path, passphrase: str | None) -> Manifest:
    # The rows first: a picture is stored before its row, so that every row's pictures are there to follow.
    requests = _copy_database(source, folder / DATABASE)
    blobs = open_blobs(settings)
    whole, damaged = _copy_blobs(blobs, folder / BLOBS)
    if passphrase is not None:
        write_atomically(folder / KEY, passphrases.seal(key_text(settings), passphrase, KEY))
    manifest = Manifest(
        created=datetime.now(UTC),
        migration=HEAD,
        requests=requests,
        blobs=len(whole) + len(damaged),
        key=passphrase is not None,
        fingerprint=blobs.fingerprint,
        damaged=tuple(damaged),
        lacking=tuple(lacking(folder / DATABASE, whole, Vault(sealing_key(settings)))),
        files={str(path.relative_to(folder)): file_digest(path) for path in _files(folder)},
    )
    return manifest.signed(blobs.derive("manifest"))


def _check_whole(manifest: Manifest) -> None:
    damaged, lacks = manifest.damaged, manifest.lacking
    wrong = []
    if damaged:
        wrong.append(f"{len(damaged)} of {manifest.blobs} blobs do not open ({_some(damaged)})")
    if lacks:
        wrong.append(f"{len(lacks)} of {manifest.requests} requests lack pictures ({_some(lacks)})")
    if wrong:
        raise StorageError(
            f"backup: {' and '.join(wrong)}",
            hint="submit those requests again, each as it was, or back up the rest with --allow-damaged",
        )


def sqlite_file(settings: Settings, hint: str) -> Path:
    """Returns the database's file. Raises InputError for another kind of database, with this hint."""
    url = make_url(settings.database)
    if url.get_backend_name() != "sqlite":
        raise InputError(f"database_url: {url.get_backend_name()} is not backed up from here", hint=hint)
    if not url.database or url.database.startswith("file:"):
        raise InputError("database_url: not a plain SQLite file", hint="write e.g. sqlite:////var/lib/expunge.db")
    return Path(url.database)


def key_text(settings: Settings) -> str:
    """Returns the sealing key as text. Raises StorageError if there is none."""
    if settings.blob_key:
        return settings.blob_key.strip()
    file = settings.home / KEY_FILE
    if not file.is_file():
        raise StorageError(f"{file} does not exist: there is no key to back up", hint="leave the passphrase out")
    return file.read_text("ascii").strip()


def lacking(database: Path, blobs: Iterable[str], vault: Vault | None) -> list[str]:
    """Finds the requests of an SQLite file that need a picture which is not among `blobs`.

    Without a vault, those that an earlier release left in the clear. Raises StorageError if a row does not open.
    """
    there = set(blobs)
    with contextlib.closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as reader:
        states = ", ".join("?" * len(NEEDED))
        sealed = any(row[1] == "data_key" for row in reader.execute("PRAGMA table_info(requests)"))
        if sealed and vault is None:
            return []
        key = "data_key" if sealed else "NULL"
        query = f"SELECT id, {key}, body FROM requests WHERE state IN ({states}) ORDER BY id"
        rows = reader.execute(query, sorted(NEEDED)).fetchall()
    return [id for id, key, body in rows if not there.issuperset(_request(id, key, body, vault).blobs)]


def _request(id: str, data_key: str | None, body: str, vault: Vault | None) -> RemovalRequest:
    text = body if data_key is None or vault is None else vault.envelope(id, data_key).open("body", body)
    return RemovalRequest.model_validate_json(text)


@contextlib.contextmanager
def storage(what: str, done: str = "written") -> Iterator[None]:
    """Turns errors of the disk and of SQLite into StorageError."""
    try:
        yield
    except ExpungeError:
        raise
    except ValidationError:  # its text would quote a request
        raise StorageError(
            f"{what} cannot be {done}: the database holds a row that cannot be read",
            hint="restore it from an earlier backup",
        ) from None
    except (OSError, sqlite3.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StorageError(
            f"{what} cannot be {done} ({reason})", hint="check the disk and its free space, then repeat"
        ) from None


def _copy_database(source: Path, target: Path) -> int:
    """Uses SQLite's own backup: one consistent state, whoever writes meanwhile. Returns the number of requests."""
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


def _copy_blobs(blobs: BlobStore, target: Path) -> tuple[list[str], list[str]]:
    """Copies the blobs, still sealed. Returns those that open, and those that do not."""
    whole: list[str] = []
    damaged: list[str] = []
    for blob in blobs.ids():
        try:
            sealed = blobs.sealed(blob)
        except NotFoundError:
            continue  # its request was refused just now
        write_atomically(target / blob[:2] / blob, sealed)
        (whole if blobs.opens(blob, sealed) else damaged).append(blob)
    if whole or damaged:
        mark(Folder(str(target)), blobs.fingerprint)
    return whole, damaged


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _some(ids: tuple[str, ...]) -> str:
    """The first three, shortened: 16 digits tell blobs apart."""
    return ", ".join(id[:16] for id in ids[:3]) + (", ..." if len(ids) > 3 else "")
