"""Seals a short text with a passphrase: scrypt, then AES-256-GCM. The purpose of the text is authenticated with it."""

import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from expunge.errors import InputError

SHORTEST = 16  # characters: scrypt makes guessing slow, not a short passphrase good
_SALT, _NONCE = 16, 12


def check(passphrase: str) -> None:
    """Raises InputError for a passphrase that is too short."""
    if len(passphrase) < SHORTEST:
        raise InputError(
            f"passphrase: {len(passphrase)} characters where {SHORTEST} are needed",
            hint="make one with `openssl rand -base64 24`",
        )


def seal(text: str, passphrase: str, purpose: str) -> bytes:
    salt, nonce = secrets.token_bytes(_SALT), secrets.token_bytes(_NONCE)
    return salt + nonce + _cipher(salt, passphrase).encrypt(nonce, text.encode(), purpose.encode())


def unseal(sealed: bytes, passphrase: str, purpose: str) -> str:
    """Raises InputError if the passphrase is wrong, or if what it sealed was altered."""
    salt, nonce, body = sealed[:_SALT], sealed[_SALT : _SALT + _NONCE], sealed[_SALT + _NONCE :]
    try:
        return _cipher(salt, passphrase).decrypt(nonce, body, purpose.encode()).decode()
    except (InvalidTag, ValueError):  # ValueError: it was cut short
        raise InputError("passphrase: it does not open the backup's key", hint="use the one it was made with") from None


def _cipher(salt: bytes, passphrase: str) -> AESGCM:
    return AESGCM(Scrypt(salt=salt, length=32, n=2**16, r=8, p=1).derive(passphrase.encode()))
