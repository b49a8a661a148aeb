"""One JSON file that one stage leaves: a stage whose output is there, and can be read, is not run again."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel

from expunge.errors import StorageError
from expunge.files import write_atomically
from expunge.logs import get_logger

Content = TypeVar("Content", bound=BaseModel)
NOT_UNDERSTOOD = (ValueError, KeyError, TypeError, AttributeError)
"""What parsing a damaged file raises. pydantic's ValidationError is a ValueError."""


class LostError(StorageError):
    """What a stage has left, or should have left, is missing or damaged; the message names the file."""


@dataclass(frozen=True)
class Document(Generic[Content]):
    """The file at `path`; `parse` understands what this release and earlier ones have written there.

    Every method raises StorageError where the disk does not give the file, and OSError where it does not take it.
    """

    path: Path
    parse: Callable[[bytes], Content]

    def read(self, *, valid: Callable[[Content], bool] | None = None) -> Content | None:
        """Return the content; None where there is none, or one that makes no sense or is not `valid`.

        A document may name what lies elsewhere: `valid` says whether that is there. Reading changes nothing.
        """
        try:
            found = self.parse(self.path.read_bytes())
        except (FileNotFoundError, *NOT_UNDERSTOOD):
            return None
        except OSError as error:
            raise StorageError(
                f"{self.path} cannot be read ({error.strerror})", hint="check the disk, then repeat"
            ) from None
        return found if valid is None or valid(found) else None

    def expect(self) -> Content:
        """Return what an earlier stage has left. Raises LostError where it is missing or damaged."""
        found = self.read()
        if found is None:
            raise LostError(f"{self.path} is missing or damaged", hint="check the disk, then run the night again")
        return found

    def once(self, compute: Callable[[], Content], *, valid: Callable[[Content], bool] | None = None) -> Content:
        """Return what `read` finds; else set aside what lies there, compute the content and write it."""
        found = self.read(valid=valid)
        if found is None:
            self.set_aside()
            found = compute()
            self.write(found)
        return found

    def write(self, content: Content) -> None:
        """Write it, whole or not at all."""
        write_atomically(self.path, content.model_dump_json())

    def set_aside(self) -> None:
        """Make room for a file that is made again: keep what is there as `NAME.unreadable`, and name it in the log."""
        if self.path.exists():
            aside = self.path.with_name(f"{self.path.name}.unreadable")
            self.path.replace(aside)
            get_logger("runs").warning(
                "this file is damaged, or names what is gone: it is made again", file=str(self.path), kept=str(aside)
            )
