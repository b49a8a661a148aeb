"""Stage outputs on disk: a stage whose output is there is not run again."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from expunge.errors import UnavailableError
from expunge.files import lock, write_atomically

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


@contextmanager
def only_driver(folder: Path, batch: str) -> Iterator[None]:
    """Hold a night for this process; the lock ends with it, however it ends. Raises UnavailableError if it is held."""
    with ExitStack() as held:
        try:
            held.enter_context(lock(folder / ".lock", wait=False))
        except BlockingIOError:
            raise UnavailableError(
                f"batch {batch} is being run by another driver", hint="wait for it, or stop its Ray job"
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
