"""The sealing key, and the keys that are derived from it: one secret to keep, and a separate key for each purpose."""

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

Purpose = Literal[
    "manifest", "checkpoint", "cache", "ledger", "audit", "lookup", "data keys", "documents", "tokens", "answers"
]
"""What a derived key signs, hashes or wraps. No two purposes share a key, and none shares the sealing key."""


def new_key() -> str:
    """Writes a sealing key as text, in base64."""
    return base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()


def decode(text: str, where: str, hint: str = "make one with `openssl rand -base64 32`") -> bytes:
    """Returns the 32 bytes of a sealing key that is written as text. Raises InputError, beginning with `where`."""
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{where}: not base64", hint=hint) from None
    if len(key) != KEY_BYTES:
        raise InputError(f"{where}: {len(key)} bytes where {KEY_BYTES} are needed", hint=hint)
    return key


def fingerprint(key: bytes) -> str:
    """Returns 16 hex digits that tell two keys apart and give neither away."""
    return sign(key, b"expunge sealing key")[:16]


def derive(key: bytes, purpose: Purpose) -> bytes:
    """Derives the 32-byte key for one purpose (HKDF-SHA256, RFC 5869)."""
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=f"expunge {purpose}".encode()).derive(key)


def sign(key: bytes, data: bytes) -> str:
    """Returns the HMAC-SHA256 in hexadecimal."""
    return hmac.new(key, data, hashlib.sha256).hexdigest()


def is_signed(key: bytes, data: bytes, signature: str) -> bool:
    """True if `sign` made this signature; takes the same time either way."""
    return hmac.compare_digest(sign(key, data).encode(), signature.encode())
