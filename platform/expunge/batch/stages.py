"""Stage outputs on disk: a stage whose output is there is not run again."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from expunge.errors import UnavailableError

PLAN = "plan.json"
"""The name of a batch's plan in the batch's folder."""

Output = TypeVar("Output", bound=BaseModel)


def once(path: Path, kind: type[Output], compute: Callable[[], Output]) -> Output:
    """The output at `path`, computed and written first where it is not there yet.

    The folder is named by the content of what goes in: equal input finds its output, changed input does not.
    """
    if path.exists():
        return kind.model_validate_json(path.read_text())
    output = compute()
    write_atomically(path, output.model_dump_json())
    return output


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, also after a kill in the middle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.replace(path)


@contextmanager
def only_driver(folder: Path, batch: str) -> Iterator[None]:
    """Hold a night for this process; the lock ends with it, however it ends. Raises UnavailableError if it is held."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UnavailableError(
                f"batch {batch} is being run by another driver", mend="wait for it, or stop its Ray job"
            ) from None
        yield


class Progress:
    """Where a job is: one small JSON file that the waiting command reads."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "progress.json"

    def read(self) -> tuple[str, int, int]:
        """(stage, done, total); ("wait", 0, 0) before the job has started."""
        try:
            at = json.loads(self._path.read_text())
        except FileNotFoundError:
            return "wait", 0, 0
        return at["stage"], at["done"], at["total"]

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        write_atomically(self._path, json.dumps({"stage": stage, "done": done, "total": total}))
