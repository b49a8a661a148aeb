"""Decide whose fault a failure is: the job's own, or the platform's, which is retried without blaming a request."""

from ray.exceptions import RayError, RayTaskError

from expunge.errors import ExpungeError, NotFoundError, StorageError, UnavailableError, last_line


def is_platforms(error: BaseException) -> bool:
    """Return whether a service, a disk, a node or its memory failed, or something that was stored is gone.

    An OSError without a number is a library's complaint about a file's content: the model is at fault.
    """
    cause = cause_of(error)
    return (
        isinstance(cause, UnavailableError | StorageError | NotFoundError | MemoryError)
        or (isinstance(cause, OSError) and cause.errno is not None)
        or isinstance(cause, RayError)
    )


def reason(error: BaseException) -> str:
    """Describe an error in one line: our own by its message, any other with its type."""
    cause = cause_of(error)
    return str(cause) if isinstance(cause, ExpungeError) else f"{type(cause).__name__}: {last_line(cause)}"


def cause_of(error: BaseException) -> BaseException:
    """Return the error that a task raised, without Ray's wrapper."""
    return error.cause if isinstance(error, RayTaskError) else error
