"""Locks that let one process at a time run a night or a job; each is a lease in the request database.

All nodes share the database. File locks would not do: some shared volumes refuse them, or grant them to everybody.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager

from expunge.requests.leases import Lease, lease
from expunge.requests.store import open_store
from expunge.settings import Settings

PATIENCE_S = 600.0
"""Seconds that a night waits for a database that is locked or cannot be reached."""


@contextmanager
def hold(settings: Settings, what: str, *, wait: bool = False) -> Iterator[Lease]:
    """Hold the lock that `batch_lock`, `job_lock` or `promotion_lock` names, until the block or this process ends.

    Without `wait`, raises HeldError, an UnavailableError, if another process holds it. Call the lease's `check` right
    before anything that only one process may do: it raises UnavailableError if the lock has been lost.
    """
    with closing(open_store(settings, patience=PATIENCE_S)) as store, lease(store, what, wait=wait) as held:
        yield held


def batch_lock(batch: str) -> str:
    """Return the name of the lock that keeps a second driver from a batch."""
    return f"batch {batch}"


def job_lock(job: str) -> str:
    """Return the name of the lock that keeps a second Ray task from a job."""
    return f"job {job}"


def promotion_lock(model: str) -> str:
    """Return the name of the lock under which a model's champion is checked and replaced."""
    return f"promotion of {model}"
