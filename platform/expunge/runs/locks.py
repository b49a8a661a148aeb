"""The names of the leases that let one process at a time run a night or a job, or promote a version.

All nodes share the database that holds them. File locks would not do: some shared volumes refuse them, or grant them to
everybody.
"""

PATIENCE_S = 600.0
"""Seconds that a night waits for a database that is locked or cannot be reached."""


def batch_lock(batch: str) -> str:
    """Return the name of the lease that keeps a second driver from a batch."""
    return f"batch {batch}"


def job_lock(job: str) -> str:
    """Return the name of the lease that keeps a second Ray task from a job."""
    return f"job {job}"


def promotion_lock(model: str) -> str:
    """Return the name of the lease under which a model's champion is checked and replaced."""
    return f"promotion of {model}"
