"""Sealed, content-addressed storage. Images of people are personal data: nothing is at rest in the clear.

A blob is `EXB1`, a 12-byte nonce, and the AES-256-GCM ciphertext with the blob's id as associated data, so that a
sealed blob moved under another id does not open.
"""

import base64
import binascii
import contextlib
import hashlib
import os
import secrets
from pathlib import Path
from typing import cast

import fsspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from expunge.errors import InputError, NotFoundError, StorageError
from expunge.files import make_private, write_atomically, write_new
from expunge.settings import Settings

_MAGIC = b"EXB1"
_NONCE = 12
_KEY = 32
_LARGEST = 2**31 - 64  # what OpenSSL seals in one call


class BlobStore:
    """Blobs under `url` (a local path, s3://bucket/prefix, ... by fsspec), sealed with a 32-byte `key`.

    Raises InputError for a key of another length and for a URL whose fsspec driver is missing.
    """

    def __init__(self, url: str, key: bytes) -> None:
        if len(key) != _KEY:
            raise InputError(f"blob_key: {len(key)} bytes", hint=f"it must be {_KEY} bytes")
        self._cipher = AESGCM(key)
        try:
            fs, root = url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise InputError(f"blob_url: {error}", hint="install the driver or use a local path") from None
        self._fs = cast(fsspec.AbstractFileSystem, fs)
        self._root = str(root).rstrip("/")
        self._local = isinstance(fs, LocalFileSystem)

    def put(self, data: bytes) -> str:
        """Seals and stores `data`; returns its id, the SHA-256 of the plaintext in hex.

        Idempotent: what is there and opens is left alone, what is there and does not open is replaced. Raises
        StorageError if it cannot be stored; then nothing is left behind.
        """
        blob = hashlib.sha256(data).hexdigest()
        if len(data) > _LARGEST:
            raise StorageError(f"a blob of {len(data):,} bytes is over the limit of {_LARGEST:,}", hint="split it")
        try:
            self.get(blob)
            return blob
        except NotFoundError:
            pass
        except StorageError:
            pass  # damaged, or sealed with another key: the plaintext is at hand, so it can be repaired
        nonce = secrets.token_bytes(_NONCE)
        sealed = _MAGIC + nonce + self._cipher.encrypt(nonce, data, blob.encode())
        try:
            if self._local:
                write_atomically(Path(self._path(blob)), sealed)
            else:
                self._fs.pipe_file(self._path(blob), sealed)  # an object store shows an object whole or not at all
        except OSError as error:
            raise _refused("write", blob, error) from None
        return blob

    def get(self, blob: str) -> bytes:
        """The plaintext. Raises NotFoundError, or StorageError if it was altered or sealed with another key."""
        try:
            sealed = cast(bytes, self._fs.cat_file(self._path(blob)))
        except FileNotFoundError:
            raise NotFoundError(
                f"blob {blob} does not exist", hint="it was purged, or EXPUNGE_BLOB_URL names another store"
            ) from None
        except OSError as error:
            raise _refused("read", blob, error) from None
        body = len(_MAGIC) + _NONCE
        try:
            if not sealed.startswith(_MAGIC) or len(sealed) < body:
                raise InvalidTag
            return self._cipher.decrypt(sealed[len(_MAGIC) : body], sealed[body:], blob.encode())
        except InvalidTag:
            hint = "restore it from a backup, or set EXPUNGE_BLOB_KEY to the key it was sealed with"
            raise StorageError(f"blob {blob} does not open: it was altered, or the key is another", hint=hint) from None

    def has(self, blob: str) -> bool:
        try:
            return bool(self._fs.exists(self._path(blob)))
        except OSError as error:
            raise _refused("look up", blob, error) from None

    def delete(self, blob: str) -> None:
        """Deletes the blob; one that is not there is no error."""
        try:
            self._fs.rm_file(self._path(blob))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _refused("delete", blob, error) from None

    def _path(self, blob: str) -> str:
        if len(blob) != 64 or not set(blob) <= set("0123456789abcdef"):
            raise NotFoundError(f"blob {blob!r} is no SHA-256", hint="an id has 64 hex digits")
        return f"{self._root}/{blob[:2]}/{blob}"


def open_blobs(settings: Settings) -> BlobStore:
    """The store of these settings. The key is `blob_key`, else `blob.key` in the home, which is made if there is none.

    Raises InputError for a malformed key, StorageError if the home cannot be written or the key of its blobs is gone.
    """
    if settings.blob_key:
        return BlobStore(settings.blobs, _decode_key(settings.blob_key, "blob_key"))
    file = settings.home / "blob.key"
    try:
        if not file.exists() and _has_blobs(settings.blobs) and not file.exists():
            raise StorageError(
                f"{file} is gone, and {settings.blobs} holds blobs sealed with it",
                hint="restore it or set EXPUNGE_BLOB_KEY",
            )
        _make_key(file)
        text = file.read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(
            f"{file} cannot be made or read ({error})", hint="check EXPUNGE_HOME or set EXPUNGE_BLOB_KEY"
        ) from None
    return BlobStore(settings.blobs, _decode_key(text.strip(), str(file)))


def _make_key(file: Path) -> None:
    """Leaves one whole key in `file`, however many processes try: only the first hard link succeeds."""
    if file.exists():
        return
    make_private(file.parent)
    neighbour = file.with_name(f".{file.name}.{secrets.token_hex(6)}.tmp")
    try:
        write_new(neighbour, base64.b64encode(secrets.token_bytes(_KEY)) + b"\n")
        with contextlib.suppress(FileExistsError):
            os.link(neighbour, file)
    finally:
        neighbour.unlink(missing_ok=True)


def _decode_key(text: str, where: str) -> bytes:
    hint = "make one with `openssl rand -base64 32`"
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{where}: not base64", hint=hint) from None
    if len(key) != _KEY:
        raise InputError(f"{where}: {len(key)} bytes where {_KEY} are needed", hint=hint)
    return key


def _has_blobs(url: str) -> bool:
    fs, root = url_to_fs(url)
    return isinstance(fs, LocalFileSystem) and Path(root).is_dir() and any(Path(root).glob("[0-9a-f][0-9a-f]/*"))


def _refused(verb: str, blob: str, error: OSError) -> StorageError:
    reason = (error.strerror or str(error) or type(error).__name__).lower()
    return StorageError(
        f"the blob store cannot {verb} {blob[:12]} ({reason})", hint="free space or check EXPUNGE_BLOB_URL, then repeat"
    )
