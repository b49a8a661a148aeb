"""Restores a backup: all of it is checked before anything is written, and nothing is overwritten.

A restore that was killed, or that filled the disk, leaves a note of its backup, and can then be continued.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from expunge.errors import InputError, StorageError
from expunge.files import file_digest, write_atomically
from expunge.requests import keys
from expunge.requests import passphrase as passphrases
from expunge.requests.backup import key_text, lacking, sqlite_file, storage
from expunge.requests.blobs import KEY_FILE, blob_ids, mark, marker
from expunge.requests.database import HEAD
from expunge.requests.filesystems import Folder
from expunge.requests.manifest import BLOBS, DATABASE, KEY, MANIFEST, Manifest, altered, read_manifest
from expunge.requests.sealing import Seal
from expunge.requests.vault import Vault
from expunge.settings import Settings

_MAY_BE_THERE = frozenset({"config.toml", KEY_FILE})
_NOTE = ".restoring"


def restore(settings: Settings, source: Path, passphrase: str | None = None, *, unverified: bool = False) -> Manifest:
    """Restore a backup into an empty home (config.toml and blob.key may be there); returns what it holds.

    The key is the one that the passphrase opens, EXPUNGE_BLOB_KEY or blob.key. unverified: also restore without a key,
    or a backup of an earlier version, which is not signed; the manifest then names what is damaged.

    Raises InputError for a home or blob store that is not empty, a wrong passphrase, and a backup that nothing proves
    to be unaltered; StorageError for a backup that is incomplete, altered, or sealed with another key. Then nothing is
    written.
    """
    target = sqlite_file(settings, "restore it with `pg_restore`, and the bucket from its own versions")
    manifest = read_manifest(source)
    if manifest.migration > HEAD:
        raise StorageError(f"the backup is of a newer expunge (migration {manifest.migration})", hint="upgrade expunge")
    text = _key(settings, source, manifest, passphrase)
    key = None if text is None else keys.decode(text, "the sealing key")
    _check_signature(manifest, source, key, unverified)
    for name, digest in manifest.files.items():
        path = source / name
        if not path.is_file() or file_digest(path) != digest:
            raise altered(source, name)
    blobs = Folder(settings.blobs)
    backup = file_digest(source / MANIFEST)
    _check_empty(settings, target, blobs, manifest, key, goes_on=_noted(settings) == backup)
    if manifest.version == 1:
        manifest = _looked_at(manifest, source, key)
    with storage(f"the home {settings.home}"):
        settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        for half in settings.home.glob(".*.tmp"):
            half.unlink()
        write_atomically(settings.home / _NOTE, backup)
        if text is not None and not settings.blob_key:
            write_atomically(settings.home / KEY_FILE, f"{text}\n".encode())
        if manifest.fingerprint and manifest.blobs:
            mark(blobs, manifest.fingerprint)
        for name, blob in _blobs(manifest):
            blobs.write(f"{blob[:2]}/{blob}", _read(source, name, manifest))
        write_atomically(target, _read(source, DATABASE, manifest))  # last: a row never lacks its pictures
        (settings.home / _NOTE).unlink()
    return manifest


def _key(settings: Settings, source: Path, manifest: Manifest, passphrase: str | None) -> str | None:
    """Returns the key at hand, as text."""
    here = key_text(settings) if settings.blob_key or (settings.home / KEY_FILE).is_file() else None
    if passphrase is None:
        return here
    if not manifest.key:
        raise InputError("passphrase: the backup holds no key", hint="leave it out, and set EXPUNGE_BLOB_KEY")
    try:
        sealed = (source / KEY).read_bytes()
    except OSError:
        raise altered(source, KEY) from None
    key = passphrases.unseal(sealed, passphrase, KEY)
    if here not in (None, key):
        where = "EXPUNGE_BLOB_KEY" if settings.blob_key else str(settings.home / KEY_FILE)
        raise InputError(f"{where} is another key than the backup's", hint="take it away, or leave the passphrase out")
    return key


def _check_signature(manifest: Manifest, source: Path, key: bytes | None, unverified: bool) -> None:
    if (key is None or manifest.version == 1) and not unverified:
        why, hint = (
            ("no key is at hand", "give --passphrase-file or set EXPUNGE_BLOB_KEY to check it, or add --unverified")
            if key is None
            else ("an earlier version made it, and did not sign it", "add --unverified if you trust where it lay")
        )
        raise InputError(f"nothing says that the backup is as it was made: {why}", hint=hint)
    if key is None or manifest.version == 1:
        return
    if manifest.fingerprint != keys.fingerprint(key):
        raise _other_key(key, f"to the key whose fingerprint is {manifest.fingerprint}")
    if not manifest.is_signed(keys.derive(key, "manifest")):
        raise altered(source, MANIFEST)


def _other_key(key: bytes, which: str) -> StorageError:
    return StorageError(
        f"the key at hand (its fingerprint is {keys.fingerprint(key)}) does not open this backup",
        hint=f"set EXPUNGE_BLOB_KEY {which}",
    )


def _noted(settings: Settings) -> str | None:
    """Returns the digest of the manifest whose restore began here and did not end."""
    with storage(f"the home {settings.home}", "read"):
        note = settings.home / _NOTE
        return note.read_text("ascii") if note.is_file() else None


def _check_empty(
    settings: Settings, database: Path, blobs: Folder, manifest: Manifest, key: bytes | None, *, goes_on: bool
) -> None:
    there = (
        [path for path in settings.home.glob("*") if path.name not in _MAY_BE_THERE] if settings.home.exists() else []
    )
    there.sort(key=lambda path: path.name.startswith("."))  # show first what a person knows
    hint = "restore into a new EXPUNGE_HOME"
    if there and not goes_on:
        raise InputError(f"home: {settings.home} holds {there[0].name}", hint=hint)
    if database.exists():
        raise InputError(f"database_url: {database} exists", hint=hint)
    with storage("the blob store", "read"):
        if blob_ids(blobs) and not goes_on:
            raise InputError("blob_url: the blob store holds blobs", hint="restore into an empty one")
        mine = keys.fingerprint(key) if key else manifest.fingerprint
        if mine and marker(blobs) not in (None, mine):
            raise InputError("blob_url: the blob store is of another key", hint="restore into an empty one")


def _looked_at(manifest: Manifest, source: Path, key: bytes | None) -> Manifest:
    """Adds what an earlier version did not check in its backups. Raises StorageError if the key opens no blob."""
    blobs, damaged = dict(_blobs(manifest)), set[str]()
    with storage(f"the backup {source}", "read"):
        if key is not None:
            seal = Seal(key)
            damaged = {blob for name, blob in blobs.items() if not seal.opens(blob, _read(source, name, manifest))}
            if damaged and len(damaged) == len(blobs):
                raise _other_key(key, "to the key that it was made with")
        found = lacking(source / DATABASE, {*blobs.values()} - damaged, None if key is None else Vault(key))
    return manifest.model_copy(update={"damaged": tuple(sorted(damaged)), "lacking": tuple(found)})


def _blobs(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yields the path in the folder and the id of each blob."""
    for name in manifest.files:
        blob = name.rpartition("/")[2]
        if name.startswith(f"{BLOBS}/") and len(blob) == 64:
            yield name, blob


def _read(source: Path, name: str, manifest: Manifest) -> bytes:
    """Checks the file once more: it may have changed since all were checked."""
    data = (source / name).read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest.files[name]:
        raise altered(source, name)
    return data
