"""The sealing key, and the keys that are derived from it: one secret to keep, and a key of its own for each purpose."""

import base64
import binascii
import hashlib
import hmac
import secrets
from typing import Literal

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from expunge.errors import InputError

KEY_BYTES = 32

Purpose = Literal["manifest", "checkpoint"]
"""What a derived key signs; two purposes never share a key, and none shares one with what seals."""


def new_key() -> str:
    """A sealing key as it is written: base64."""
    return base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()


def decode(text: str, where: str, hint: str = "make one with `openssl rand -base64 32`") -> bytes:
    """The 32 bytes of a written sealing key. Raises InputError that begins with `where`."""
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{where}: not base64", hint=hint) from None
    if len(key) != KEY_BYTES:
        raise InputError(f"{where}: {len(key)} bytes where {KEY_BYTES} are needed", hint=hint)
    return key


def fingerprint(key: bytes) -> str:
    """16 hex digits that tell two keys apart and give neither away."""
    return sign(key, b"expunge sealing key")[:16]


def derive(key: bytes, purpose: Purpose) -> bytes:
    """The 32-byte key of one purpose (HKDF-SHA256, RFC 5869)."""
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=f"expunge {purpose}".encode()).derive(key)


def sign(key: bytes, data: bytes) -> str:
    """HMAC-SHA256, in hexadecimal."""
    return hmac.new(key, data, hashlib.sha256).hexdigest()


def is_signed(key: bytes, data: bytes, signature: str) -> bool:
    """Whether `sign` gave this signature; takes the same time whatever it is."""
    return hmac.compare_digest(sign(key, data).encode(), signature.encode())
