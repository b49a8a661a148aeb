"""Seals the JSON files of nights: plans hold prompts, reasons and external ids, and evidence holds what came of them.

A file is sealed with a key derived from the sealing key and bound to its name and its folder's, so that two files that
are swapped do not open. One that an earlier release wrote in the clear is read as it is.
"""

from pathlib import Path

from expunge.files import write_atomically
from expunge.requests.sealing import Seal, is_sealed
from expunge.requests.vault import Vault

PLAIN = frozenset({"format.json", "progress.json"})
"""Files that say nothing of a request: how they are written, and how far a job has got."""


class Documents:
    """Seals and opens the files of nights."""

    def __init__(self, vault: Vault) -> None:
        self._seal = Seal(vault.documents)

    def close(self, path: Path, data: bytes) -> bytes:
        """Returns what is to be written to `path`."""
        return self._seal.close(_name(path), data)

    def open(self, path: Path, data: bytes) -> bytes | None:
        """Returns the content of what lies at `path`; None if it does not open."""
        return self._seal.open(_name(path), data) if is_sealed(data) else data


def seal_folder(runs: Path, vault: Vault) -> None:
    """Seals what an earlier release left in the clear; a second call goes on where one was killed. Raises OSError."""
    documents = Documents(vault)
    for path in sorted({*runs.glob("*/*.json*"), *runs.glob("*/*/*.json*")}):
        if path.name not in PLAIN and path.is_file():
            data = path.read_bytes()
            if not is_sealed(data):
                write_atomically(path, documents.close(path, data))


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
