"""A job's folder, as the driver and the workers know it. Imports no torch: a driver must not wait for what only workers
need."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from expunge.errors import ExpungeError, InputError, NotFoundError, StorageError
from expunge.files import write_atomically

JOB, PREPARED, MODE, HOTFIX, FAILED = "job.json", "prepared.json", "mode.json", "hotfix.json", "failed.json"
"""What it holds: the job's description, where its tensors are, what `tasks = "auto"` came to, what training made, or
why it cannot."""

Record = Callable[[int, dict[str, float]], None]
"""Called on rank 0 with the steps done and their figures; it is pickled to the worker."""


@dataclass(frozen=True)
class TrainTask:
    """All that a worker is sent. The job lies in its folder and the tensors in the blob store: Ray carries neither."""

    folder: Path
    warm_start: Path | None
    record: Record


class Hopeless(ExpungeError):
    """Trying again would end the same way."""


FINAL: tuple[type[ExpungeError], ...] = (Hopeless, InputError, NotFoundError, StorageError)
"""What all workers fail at together, and would again."""


def give_up(folder: Path, error: ExpungeError) -> None:
    """Leave one of FINAL in the folder, for who started the workers."""
    kind = next(kind for kind in FINAL if isinstance(error, kind))
    write_atomically(folder / FAILED, json.dumps({"kind": kind.__name__, "message": error.message, "hint": error.hint}))


def failure(folder: Path) -> ExpungeError | None:
    """Why training gave up, where it did: the error itself, so that a command ends with its exit code."""
    path = folder / FAILED
    if not path.exists():
        return None
    try:
        said = json.loads(path.read_bytes())
        [kind] = [kind for kind in FINAL if kind.__name__ == said["kind"]]
        return kind(said["message"], hint=said["hint"])
    except (ValueError, KeyError, TypeError):
        return StorageError(f"{path} cannot be read", hint="run the night again: it goes on where it stopped")
