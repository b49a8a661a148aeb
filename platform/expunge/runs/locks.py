"""One process at a time: every lock of nights and jobs is taken here, as a lease in the request database.

The database is what all nodes share: a lock on a file is refused, or granted to everybody, by some shared volumes.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager

from expunge.requests.leases import Lease, lease
from expunge.requests.store import open_store
from expunge.settings import Settings

PATIENCE_S = 600.0
"""How long a night waits for a database that another process holds, or that is away."""


@contextmanager
def hold(settings: Settings, what: str, *, wait: bool = False) -> Iterator[Lease]:
    """Hold what `batch_lock`, `job_lock` or `promotion_lock` names, until the block or this process ends.

    Without `wait`, raises HeldError, an UnavailableError, where another process holds it. The lease's `check` tells
    whether that is still so: ask it right before something that only one process may do.
    """
    with closing(open_store(settings, patience=PATIENCE_S)) as store, lease(store, what, wait=wait) as held:
        yield held


def batch_lock(batch: str) -> str:
    """Name the lock of the only driver of a batch."""
    return f"batch {batch}"


def job_lock(job: str) -> str:
    """Name the lock of the only Ray task that runs a job."""
    return f"job {job}"


def promotion_lock(model: str) -> str:
    """Name the lock of whoever compares a model's champion with what was planned on it, and moves the alias."""
    return f"promotion of {model}"
