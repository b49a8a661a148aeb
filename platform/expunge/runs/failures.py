"""The errors that end a training at once; its workers record them for the process that started them."""

from typing import Self

from expunge.errors import ExpungeError, InputError, NotFoundError, StorageError
from expunge.types import Value


class Hopeless(ExpungeError):
    """Trying again would end the same way."""


FINAL: tuple[type[ExpungeError], ...] = (Hopeless, InputError, NotFoundError, StorageError)
"""Errors that all workers hit together and would hit again."""


class GivenUp(Value):
    """An error of FINAL as it is stored, so that the command ends with its exit code."""

    kind: str
    message: str
    hint: str | None

    @classmethod
    def because(cls, error: ExpungeError) -> Self:
        """Store `error`, which must be one of FINAL."""
        kind = next(kind for kind in FINAL if isinstance(error, kind))
        return cls(kind=kind.__name__, message=error.message, hint=error.hint)

    def error(self) -> ExpungeError:
        """Return the error itself. Raises ValueError for a kind that is not among FINAL."""
        [kind] = [kind for kind in FINAL if kind.__name__ == self.kind]
        return kind(self.message, hint=self.hint)
