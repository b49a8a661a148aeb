"""Whose fault a failure is: the platform's, so that it is tried again and no request is blamed, or the job's own."""

from ray.exceptions import RayError, RayTaskError

from expunge.errors import ExpungeError, NotFoundError, StorageError, UnavailableError, last_line


def is_platforms(error: BaseException) -> bool:
    """Whether a service, a disk, a node or its memory failed, or something that had been stored is gone.

    An OSError without a number is a library's complaint about a file's content: the model is at fault.
    """
    cause = cause_of(error)
    return (
        isinstance(cause, UnavailableError | StorageError | NotFoundError | MemoryError)
        or (isinstance(cause, OSError) and cause.errno is not None)
        or isinstance(cause, RayError)
    )


def reason(error: BaseException) -> str:
    """One line for people: an error of ours speaks for itself, another one is named by its type."""
    cause = cause_of(error)
    return str(cause) if isinstance(cause, ExpungeError) else f"{type(cause).__name__}: {last_line(cause)}"


def cause_of(error: BaseException) -> BaseException:
    """What a task raised, where Ray has wrapped it."""
    return error.cause if isinstance(error, RayTaskError) else error
