"""The manifest of a backup: what is in it, what was damaged or missing, and a signature by the sealing key."""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from expunge.errors import InputError, StorageError
from expunge.requests import keys
from expunge.requests.blobs import MARKER

MANIFEST, DATABASE, BLOBS, KEY = "manifest.json", "expunge.db", "blobs", "key.sealed"

_FILES = re.compile(rf"{re.escape(DATABASE)}|{re.escape(KEY)}|{BLOBS}/({MARKER}|[0-9a-f]{{2}}/[0-9a-f]{{64}})")


class Manifest(BaseModel):
    """Written last, so that a folder without one is no backup. Version 1 had no signature, and verified nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1, 2] = 2
    created: datetime
    migration: str
    requests: int
    blobs: int
    key: bool
    fingerprint: str = ""
    """The fingerprint of the sealing key."""
    damaged: tuple[str, ...] = ()
    """Blobs that did not open when the backup was made; they are in it as they lay."""
    lacking: tuple[str, ...] = ()
    """Requests that lacked a picture."""
    files: dict[str, str]
    """Path in the folder: SHA-256 in hex."""
    signature: str = ""

    def signed(self, key: bytes) -> Self:
        """The same with its signature by `key`, one that is derived for manifests."""
        return self.model_copy(update={"signature": keys.sign(key, self._content())})

    def is_signed(self, key: bytes) -> bool:
        return keys.is_signed(key, self._content(), self.signature)

    def _content(self) -> bytes:
        return json.dumps(self.model_dump(mode="json", exclude={"signature"}), sort_keys=True).encode()


def read_manifest(folder: Path) -> Manifest:
    """Raises InputError for a folder that is no backup, StorageError for one that names what no backup holds."""
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not of this version"
        raise InputError(
            f"{folder} is no backup ({MANIFEST}: {reason})", hint="name a folder that backup made"
        ) from None
    if DATABASE not in manifest.files or not all(map(_FILES.fullmatch, manifest.files)):
        raise altered(folder, MANIFEST)
    return manifest


def altered(folder: Path, name: str) -> StorageError:
    return StorageError(f"the backup {folder} was altered: {name}", hint="use another one")
