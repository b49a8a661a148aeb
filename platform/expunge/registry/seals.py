"""The seal of a folder in the registry: a change of any of its files is noticed, and so is a file that was added.

`expunge.json` holds the SHA-256 of every other file. The registry's database, which is not where the files lie, holds
the SHA-256 of `expunge.json` itself and its HMAC under a key that is derived from the sealing key. Whoever serves a
model needs no key to check the first; the platform's own commands check both.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge.files import file_digest
from expunge.requests import keys

ABOUT, LEDGER, EVIDENCE = "expunge.json", "ledger.json", "evidence.json"
_UNLISTED = frozenset({ABOUT, LEDGER, EVIDENCE})
"""What the `expunge.json` of release 0.1.0 does not list."""


MLFLOWS = "registered_model_meta"
"""MLflow writes this file beside the others when it loads a version, even where they are stored. Nothing reads it."""


class BrokenSealError(Exception):
    """A file differs from what was sealed; the message says which, and how."""


def seal(folder: Path, about: Mapping[str, object], key: bytes) -> str:
    """Write `expunge.json`: `about`, and the digests of the files in `folder`. Return the seal for the database."""
    files = {name: file_digest(folder / name) for name in _names(folder)}
    data = json.dumps({**about, "files": files}, indent=2).encode() + b"\n"
    (folder / ABOUT).write_bytes(data)
    return f"{hashlib.sha256(data).hexdigest()} {keys.sign(key, data)}"


def opened(data: bytes, seal: str | None, key: bytes | None = None) -> dict[str, Any]:
    """Return the content of `expunge.json`, checked against its seal and, with `key`, its signature.

    Release 0.1.0 made no seals: without one, nothing is checked. Raises BrokenSealError.
    """
    if seal is not None:
        digest, _, signature = seal.partition(" ")
        if hashlib.sha256(data).hexdigest() != digest:
            raise BrokenSealError(f"{ABOUT} does not match its digest")
        if key is not None and not keys.is_signed(key, data, signature):
            raise BrokenSealError(f"{ABOUT} was not signed with this platform's key")
    try:
        about = json.loads(data)
        names = about["files"].keys()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BrokenSealError(f"{ABOUT} is damaged") from None
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in names):
        raise BrokenSealError(f"{ABOUT} names a file outside its folder")
    return about


def check_file(about: Mapping[str, Any], name: str, data: bytes) -> None:
    """Raise BrokenSealError if a file's content differs; one that release 0.1.0 did not list cannot be checked."""
    expected = about["files"].get(name)
    if expected is not None and hashlib.sha256(data).hexdigest() != expected:
        raise BrokenSealError(f"{name} does not match its digest")


def check_folder(folder: Path, seal: str | None) -> dict[str, Any]:
    """Check every file in `folder`, and return the content of `expunge.json`. Raises BrokenSealError and OSError."""
    about = opened((folder / ABOUT).read_bytes(), seal)
    for name, expected in about["files"].items():
        if file_digest(folder / name) != expected:
            raise BrokenSealError(f"{name} does not match its digest")
    allowed = {*about["files"], ABOUT, MLFLOWS} | (_UNLISTED if seal is None else frozenset())
    added = [name for name in _names(folder) if name not in allowed]
    if added:
        raise BrokenSealError(f"{added[0]} was added later")
    return about


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
