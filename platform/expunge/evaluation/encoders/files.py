"""Encoders that are one file of somebody else's, named with the SHA-256 that it must have."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from expunge.errors import InputError

_DIGEST = re.compile(r"[0-9a-f]{64}")


def check_file(reference: str, usage: str) -> None:
    """Raise ValueError unless `reference` is FILE@SHA256."""
    path, _, digest = reference.rpartition("@")
    if not path or not _DIGEST.fullmatch(digest):
        raise ValueError(f"a file could change: use {usage}, with the 64 digits that `sha256sum` prints")


def find_file(reference: str) -> Path:
    """Return where the file is. Raises InputError where it is missing."""
    path, _, _ = reference.rpartition("@")
    try:
        found = Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"evaluation.encoders: {path} has no such user", hint="write the whole path") from None
    if not found.is_file():
        raise InputError(
            f"evaluation.encoders: there is no file {found}", hint="it is never downloaded: copy it to every node"
        )
    return found


def read_file(reference: str) -> bytes:
    """Return the file's content. Raises InputError where it is missing, unreadable, or not the one that was named.

    What is loaded are these bytes and not the file once more, so that it cannot change in between.
    """
    path, digest = find_file(reference), reference.rpartition("@")[2]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"evaluation.encoders: {path} cannot be read ({error.strerror})", hint="check its permissions"
        ) from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise InputError(
            f"evaluation.encoders: {path} is not the file with the SHA-256 {digest[:12]}...",
            hint="get the right file, or correct the digest if you trust this one",
        )
    return data
