"""How a blob is sealed: `EXB1`, a 12-byte nonce, and the AES-256-GCM ciphertext with the blob's id as associated data,
so that a sealed blob moved under another id does not open."""

import hashlib
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

LARGEST = 2**31 - 64
"""The most bytes that OpenSSL seals in one call."""

_MAGIC = b"EXB1"
_NONCE = 12


def is_sealed(data: bytes) -> bool:
    """True if the data begins as a sealed blob does."""
    return data.startswith(_MAGIC)


class Seal:
    """Seals and opens blobs with one 32-byte key."""

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def close(self, blob: str, data: bytes) -> bytes:
        """Seals `data`, at most LARGEST bytes, as the blob of this id."""
        nonce = secrets.token_bytes(_NONCE)
        return _MAGIC + nonce + self._cipher.encrypt(nonce, data, blob.encode())

    def open(self, blob: str, sealed: bytes) -> bytes | None:
        """Returns the plaintext of this blob; None if it does not open."""
        body = len(_MAGIC) + _NONCE
        if not is_sealed(sealed) or len(sealed) < body:
            return None
        try:
            return self._cipher.decrypt(sealed[len(_MAGIC) : body], sealed[body:], blob.encode())
        except InvalidTag:
            return None

    def opens(self, blob: str, sealed: bytes) -> bool:
        """True if these bytes are that blob: they open, and the id is the SHA-256 of their plaintext."""
        data = self.open(blob, sealed)
        return data is not None and hashlib.sha256(data).hexdigest() == blob
