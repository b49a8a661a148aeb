"""Seals the texts of requests in the database, each under a data key of the request that the sealing key wraps.

Every sealed text is bound to its request and field, so that one moved to another row or column does not open. Without
its data key a text is noise: to purge a request is to destroy the key, wherever copies of the text lie.
"""

import base64
import binascii
import json
import secrets
from dataclasses import dataclass
from typing import Literal

from expunge.errors import StorageError
from expunge.requests import keys
from expunge.requests.sealing import Seal
from expunge.types import DEFAULT_TENANT, RemovalRequest

Field = Literal["body", "evidence", "detail"]


@dataclass(frozen=True)
class Envelope:
    """The data key of one request: `wrapped` is what its row keeps of it."""

    request: str
    wrapped: str
    seal: Seal

    def close(self, field: Field, text: str) -> str:
        """Seals `text` as this field of the request, in base64."""
        return _text(self.seal.close(f"{self.request} {field}", text.encode()))

    def opened(self, field: Field, sealed: str) -> str | None:
        """Returns the text; None if it does not open: it was altered, is of another row, or its key was destroyed."""
        data = _bytes(sealed)
        text = None if data is None else self.seal.open(f"{self.request} {field}", data)
        return None if text is None else text.decode()

    def open(self, field: Field, sealed: str) -> str:
        """Returns the text. Raises StorageError if it does not open."""
        text = self.opened(field, sealed)
        if text is None:
            raise _closed(self.request)
        return text


class Vault:
    """What the 32-byte sealing key does in the database: data keys, keyed hashes, and keys for other parts."""

    def __init__(self, key: bytes) -> None:
        self.fingerprint = keys.fingerprint(key)
        self.audit = keys.derive(key, "audit")
        self.documents = keys.derive(key, "documents")
        self.tokens = keys.derive(key, "tokens")
        self.answers = Seal(keys.derive(key, "answers"))
        self._hashing = keys.derive(key, "lookup")
        self._wrapping = Seal(keys.derive(key, "data keys"))

    def new(self, request: str) -> Envelope:
        """Makes a data key."""
        key = secrets.token_bytes(keys.KEY_BYTES)
        return Envelope(request, _text(self._wrapping.close(f"{request} key", key)), Seal(key))

    def envelope(self, request: str, wrapped: str) -> Envelope:
        """Unwraps a request's data key. Raises StorageError if it does not open."""
        data = _bytes(wrapped)
        key = None if data is None else self._wrapping.open(f"{request} key", data)
        if key is None:
            raise _closed(request)
        return Envelope(request, wrapped, Seal(key))

    def external_id(self, model: str, external_id: str, tenant: str = DEFAULT_TENANT) -> str:
        """Returns the keyed hash by which a request is found: 64 hex digits.

        That of the default tenant is as it was before there were others.
        """
        whose = () if tenant == DEFAULT_TENANT else (tenant,)
        return self._hash("external id", model, external_id, *whose)

    def blob(self, blob: str) -> str:
        """Returns the keyed hash by which the requests that name a blob are found: 64 hex digits."""
        return self._hash("blob", blob)

    def idempotency(self, *parts: str) -> str:
        """Returns the keyed hash of an Idempotency-Key, or of what was sent with it: 64 hex digits."""
        return self._hash("idempotency", *parts)

    def tombstone(self, request: RemovalRequest) -> RemovalRequest:
        """Returns what a purge leaves: id, model, due date and priority, and keyed digests where the content was."""
        return RemovalRequest(
            id=request.id,
            model=request.model,
            images=tuple(self._hash("image", image) for image in request.images),
            external_id=self.external_id(request.model, request.external_id),
            due=request.due,
            priority=request.priority,
        )

    def _hash(self, *parts: str) -> str:
        return keys.sign(self._hashing, json.dumps(parts).encode())


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def _closed(request: str) -> StorageError:
    return StorageError(
        f"the database holds a row that cannot be read: request {request} does not open with the key here",
        hint="check EXPUNGE_BLOB_KEY; if it is right, the row was altered: restore it from a backup",
    )
