"""One process at a time: every lock of nights and jobs is taken here."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from expunge.errors import UnavailableError
from expunge.files import lock
from expunge.settings import Settings


@contextmanager
def hold(settings: Settings, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold what `batch_lock`, `job_lock` or `promotion_lock` names, until the block or this process ends.

    Without `wait`, raises UnavailableError where another process holds it.
    """
    with ExitStack() as held:
        try:
            held.enter_context(lock(settings.runs / f".{what.replace(' ', '-')}.lock", wait=wait))
        except BlockingIOError:
            raise UnavailableError(
                f"{what} is held by another process", hint="wait for it to end, or stop its Ray job"
            ) from None
        yield


def batch_lock(batch: str) -> str:
    """Name the lock of the only driver of a batch."""
    return f"batch {batch}"


def job_lock(job: str) -> str:
    """Name the lock of the only Ray task that runs a job."""
    return f"job {job}"


def promotion_lock(model: str) -> str:
    """Name the lock of whoever compares a model's champion with what was planned on it, and moves the alias."""
    return f"promotion of {model}"
