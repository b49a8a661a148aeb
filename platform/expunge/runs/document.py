"""One JSON file per stage, sealed: a stage whose output can be read is not run again."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel

from expunge.errors import StorageError
from expunge.files import write_atomically
from expunge.logs import get_logger
from expunge.requests.blobs import sealing_key
from expunge.requests.documents import Documents
from expunge.requests.sealing import is_sealed
from expunge.requests.vault import Vault
from expunge.runs.formats import read_file
from expunge.settings import load_settings

Content = TypeVar("Content", bound=BaseModel)
NOT_UNDERSTOOD = (ValueError, KeyError, TypeError, AttributeError)
"""What parsing a damaged file raises. pydantic's ValidationError is a ValueError."""


class LostError(StorageError):
    """A file that a stage should have written is missing or damaged; the message names it."""


@dataclass(frozen=True)
class Document(Generic[Content]):
    """The file at `path`; `parse` reads what this release and earlier ones write there.

    Every method raises StorageError if the file cannot be read, and OSError if it cannot be written.
    """

    path: Path
    parse: Callable[[bytes], Content]

    def read(self, *, valid: Callable[[Content], bool] | None = None) -> Content | None:
        """Return the content, or None if it is missing, damaged or not `valid`.

        A document may refer to things elsewhere: `valid` says whether they are there. Reading changes nothing.
        """
        data = read_file(self.path)
        if data is not None and is_sealed(data):
            data = _documents().open(self.path, data)
        if data is None:
            return None
        try:
            found = self.parse(data)
        except NOT_UNDERSTOOD:
            return None
        return found if valid is None or valid(found) else None

    def expect(self) -> Content:
        """Return the content. Raises LostError if it is missing or damaged."""
        found = self.read()
        if found is None:
            raise LostError(f"{self.path} is missing or damaged", hint="check the disk, then run the night again")
        return found

    def once(self, compute: Callable[[], Content], *, valid: Callable[[Content], bool] | None = None) -> Content:
        """Return what `read` finds; without it, set the old file aside, compute the content and write it."""
        found = self.read(valid=valid)
        if found is None:
            self.set_aside()
            found = compute()
            self.write(found)
        return found

    def write(self, content: Content) -> None:
        """Write the content, whole or not at all."""
        write_atomically(self.path, _documents().close(self.path, content.model_dump_json().encode()))

    def set_aside(self) -> None:
        """Keep an existing file as `NAME.unreadable`, and log that it is made again."""
        if self.path.exists():
            aside = self.path.with_name(f"{self.path.name}.unreadable")
            self.path.replace(aside)
            get_logger("runs").warning(
                "this file is damaged, or refers to something missing: it is made again",
                file=str(self.path),
                kept=str(aside),
            )


def _documents() -> Documents:
    """Reads the key where this process has it: a folder that Ray carries to a worker must not carry the key."""
    return Documents(Vault(sealing_key(load_settings())))
