"""The one error hierarchy. A message says what was wrong and where; `hint` says what to do about it.

Passwords in URLs are masked: see expunge.text.

Exit codes of every command: 0 success, 1 unexpected failure, 2 bad input, 3 a verdict or gate did not pass,
4 not found, 5 a service is unreachable, 6 storage failed.
"""

from expunge.text import masked


class ExpungeError(Exception):
    """The base of every error that a user can cause or fix."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = masked(message)
        self.hint = None if hint is None else masked(hint)
        super().__init__(self.message if self.hint is None else f"{self.message}: {self.hint}")


class InputError(ExpungeError):
    """A request, a file, a setting or an argument is not acceptable."""

    exit_code = 2


class GateError(ExpungeError):
    """The work is done, but its evidence does not pass."""

    exit_code = 3


class NotFoundError(ExpungeError):
    """The named request, batch, model or version does not exist."""

    exit_code = 4


class UnavailableError(ExpungeError):
    """Ray, the tracking server or the database does not answer."""

    exit_code = 5


class StorageError(ExpungeError):
    """The blob store or the disk failed; everything accepted earlier is untouched."""

    exit_code = 6


class TransitionError(ExpungeError):
    """A request cannot move from its state to the one asked for."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """Return an error's first line, because libraries explain at length what went wrong; its type if it has none."""
    said = str(error).strip()
    return said.splitlines()[0].strip() if said else type(error).__name__


def last_line(error: BaseException) -> str:
    """Return an error's last line, because Ray puts a traceback before the message; its type if it has no message."""
    said = str(error).strip()
    return said.splitlines()[-1].strip() if said else type(error).__name__
