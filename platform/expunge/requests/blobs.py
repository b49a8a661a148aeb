"""Sealed, content-addressed storage. Images of people are personal data: nothing is at rest in the clear.

A store has one key: its first blob leaves the key's fingerprint in `key-fingerprint`, and nobody opens the store with
another key. What is damaged is kept beside its repair as `.damaged`.
"""

import contextlib
import hashlib

from expunge.errors import InputError, NotFoundError, StorageError
from expunge.files import write_once
from expunge.requests import keys
from expunge.requests.filesystems import Folder
from expunge.requests.home import recall, remember
from expunge.requests.sealing import LARGEST, Seal
from expunge.settings import Settings

MARKER = "key-fingerprint"
KEY_FILE = "blob.key"

_DAMAGED = ".damaged"
_TRIED = 8  # blobs of a store without a marker, of which one has to open


class DamagedBlobError(StorageError):
    """The blob is there, but it does not open."""


class BlobStore:
    """Blobs under `url` (a local path, s3://bucket/prefix, or another URL of fsspec's), sealed with a 32-byte `key`.

    Raises InputError for a key of another length and for a URL that keeps nothing or whose fsspec driver is missing,
    StorageError for a store of another key.
    """

    def __init__(self, url: str, key: bytes) -> None:
        if len(key) != keys.KEY_BYTES:
            raise InputError(f"blob_key: {len(key)} bytes", hint=f"it must be {keys.KEY_BYTES} bytes")
        self._key, self._seal = key, Seal(key)
        self._folder = Folder(url)
        self._marked = False
        self._check_key()

    @property
    def fingerprint(self) -> str:
        """The key's fingerprint: 16 hex digits, safe to show."""
        return keys.fingerprint(self._key)

    @property
    def marked(self) -> bool:
        """True if the store names its key, as it does from its first blob on."""
        return self._marked

    def derive(self, purpose: keys.Purpose) -> bytes:
        """Returns the 32-byte key that signs for this purpose."""
        return keys.derive(self._key, purpose)

    def put(self, data: bytes) -> str:
        """Seals and stores `data`; returns its id, the SHA-256 of the plaintext in hex.

        Idempotent: what is there and opens is left alone, what is there and does not open is repaired. Raises
        StorageError if it cannot be read or stored; then nothing is left behind.
        """
        blob = hashlib.sha256(data).hexdigest()
        if len(data) > LARGEST:
            raise StorageError(f"a blob of {len(data):,} bytes is over the limit of {LARGEST:,}", hint="split it")
        damaged = False
        try:
            self.get(blob)
            return blob
        except NotFoundError:
            pass
        except DamagedBlobError:
            damaged = True
        sealed = self._seal.close(blob, data)
        try:
            self._mark()
            # Only the first damaged version: it may be from a time when a store could hold blobs of several keys.
            if damaged and not self._folder.has(_name(blob) + _DAMAGED):
                self._folder.copy(_name(blob), _name(blob) + _DAMAGED)
            self._folder.write(_name(blob), sealed)
        except OSError as error:
            raise _refused("write", blob, error) from None
        return blob

    def get(self, blob: str) -> bytes:
        """Returns the plaintext. Raises NotFoundError, StorageError, and DamagedBlobError if it does not open."""
        data = self._seal.open(blob, self.sealed(blob))
        if data is None:
            raise DamagedBlobError(
                f"blob {blob} does not open: it is damaged",
                hint="submit its request again, or restore it from a backup",
            )
        return data

    def sealed(self, blob: str) -> bytes:
        """Returns the blob as it is stored. Raises NotFoundError, StorageError."""
        try:
            return self._folder.read(_name(blob))
        except FileNotFoundError:
            raise NotFoundError(
                f"blob {blob} does not exist", hint="it was purged, or EXPUNGE_BLOB_URL names another store"
            ) from None
        except OSError as error:
            raise _refused("read", blob, error) from None

    def opens(self, blob: str, sealed: bytes) -> bool:
        """True if these bytes are that blob, sealed with this key."""
        return self._seal.opens(blob, sealed)

    def has(self, blob: str) -> bool:
        name = _name(blob)
        try:
            return self._folder.has(name)
        except OSError as error:
            raise _refused("look up", blob, error) from None

    def delete(self, blob: str) -> None:
        """Deletes the blob and what was kept of a damaged one; one that is not there is no error."""
        name = _name(blob)
        try:
            self._folder.delete(name)
            self._folder.delete(name + _DAMAGED)
        except OSError as error:
            raise _refused("delete", blob, error) from None

    def ids(self) -> list[str]:
        """Returns the id of every blob, sorted, from a listing of the whole store."""
        try:
            return blob_ids(self._folder)
        except OSError as error:
            raise _refused("list", "its blobs", error) from None

    def _check_key(self) -> None:
        """Costs one small read if the store has a marker. Raises StorageError for a store of another key."""
        try:
            there = marker(self._folder)
            if there is None:
                self._adopt()
            else:
                self._compare(there)
        except OSError as error:
            raise _refused("read", MARKER, error) from None

    def _compare(self, there: str) -> None:
        if there != self.fingerprint:
            raise StorageError(
                f"the blobs are sealed with another key: its fingerprint is {there}, and that of the key here is "
                f"{self.fingerprint}",
                hint=f"set EXPUNGE_BLOB_KEY to the key whose fingerprint is {there}",
            )
        self._marked = True

    def _adopt(self) -> None:
        """Mark a store of an earlier version, which has blobs but no marker, if this key opens them."""
        tried = blob_ids(self._folder)[:_TRIED]
        if tried and not any(self._opens(blob) for blob in tried):
            raise StorageError(
                f"the key here (its fingerprint is {self.fingerprint}) opens none of the blobs",
                hint="set EXPUNGE_BLOB_KEY to the key that they were sealed with",
            )
        if tried:
            with contextlib.suppress(OSError):  # a store that may only be read: the next one to write marks it
                self._mark()

    def _opens(self, blob: str) -> bool:
        try:
            return self.opens(blob, self.sealed(blob))
        except NotFoundError:
            return False

    def _mark(self) -> None:
        """Leave the fingerprint, unless it is there. Raises StorageError if another key was faster, OSError."""
        if not self._marked:
            self._compare(mark(self._folder, self.fingerprint))


def open_blobs(settings: Settings) -> BlobStore:
    """Open the blob store of these settings. Its key is `blob_key`, else `blob.key` in the home, made if there is none.

    Raises InputError for a malformed key, StorageError if the home cannot be written, the key of its blobs is gone, the
    key at hand is not theirs, or the home remembers blobs and there are none.
    """
    store, known = _open(settings), recall(settings)
    if known is not None and known.key is not None and not store.marked:
        raise StorageError(
            "the blob store is gone or empty, but this home has stored pictures in it",
            hint="restore it from a backup, or correct EXPUNGE_BLOB_URL; to start over, use a new EXPUNGE_HOME",
        )
    if known is not None and store.marked:
        remember(settings, key=store.fingerprint)
    return store


def _open(settings: Settings) -> BlobStore:
    return BlobStore(settings.blobs, sealing_key(settings))


def sealing_key(settings: Settings) -> bytes:
    """Returns `blob_key`, else the key in the home's `blob.key`, which is made if there is none.

    Raises InputError for a malformed key, StorageError if the home cannot be written, or the key of its blobs is gone.
    """
    if settings.blob_key:
        return keys.decode(settings.blob_key, "blob_key")
    file = settings.home / KEY_FILE
    try:
        if not file.exists() and is_used(Folder(settings.blobs)) and not file.exists():
            raise StorageError(
                f"{file} is gone, and the blob store holds blobs sealed with it",
                hint="restore it or set EXPUNGE_BLOB_KEY",
            )
        write_once(file, f"{keys.new_key()}\n".encode())
        text = file.read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(
            f"{file} cannot be made or read ({error})", hint="check EXPUNGE_HOME or set EXPUNGE_BLOB_KEY"
        ) from None
    # Never a new key here: what has been sealed would not open again.
    return keys.decode(text, str(file), "restore it from a backup or set EXPUNGE_BLOB_KEY")


def is_used(folder: Folder) -> bool:
    """True if it is, or was, a store of blobs. Raises StorageError."""
    try:
        return marker(folder) is not None or bool(blob_ids(folder))
    except OSError as error:
        raise _refused("read", MARKER, error) from None


def mark(folder: Folder, fingerprint: str) -> str:
    """Leave the key's fingerprint unless there is one; returns the one that is there. Raises StorageError, OSError."""
    return _read_marker(folder.write_once(MARKER, f"{fingerprint}\n".encode()))


def blob_ids(folder: Folder) -> list[str]:
    """Returns the id of every blob in the folder, sorted. Raises OSError."""
    found = (name.rpartition("/") for name in folder.names())
    return [blob for prefix, _, blob in found if _is_id(blob) and prefix == blob[:2]]


def marker(folder: Folder) -> str | None:
    """Returns its key's fingerprint; None if it has no blobs yet. Raises StorageError if it is damaged, OSError."""
    try:
        return _read_marker(folder.read(MARKER))
    except FileNotFoundError:
        return None


def _read_marker(data: bytes) -> str:
    text = data.decode("ascii", "replace").strip()
    if len(text) != 16 or not set(text) <= set("0123456789abcdef"):
        raise StorageError(
            f"{MARKER} in the blob store is damaged", hint="delete it: it is made again if this key opens the blobs"
        )
    return text


def _is_id(name: str) -> bool:
    return len(name) == 64 and set(name) <= set("0123456789abcdef")


def _name(blob: str) -> str:
    if not _is_id(blob):
        raise NotFoundError(f"blob {blob!r} is not a SHA-256", hint="an id has 64 hex digits")
    return f"{blob[:2]}/{blob}"


def _refused(verb: str, what: str, error: OSError) -> StorageError:
    reason = (error.strerror or str(error) or type(error).__name__).lower()
    return StorageError(
        f"the blob store cannot {verb} {what[:16]} ({reason})", hint="free space or check EXPUNGE_BLOB_URL, then repeat"
    )
