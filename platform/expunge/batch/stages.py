"""Stage outputs on disk: a stage whose output is there, and can be read, is not run again."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from expunge.errors import StorageError, UnavailableError
from expunge.files import lock, write_atomically
from expunge.logs import get_logger

PLAN, NIGHT = "plan.json", "night.json"
"""Names in a batch's folder: what was planned, and what the finished night leaves."""
EVIDENCE, VERSION, OUTCOME = "evidence.json", "version.json", "outcome.json"
"""Names in a job's folder, beside those of its training."""

Output = TypeVar("Output", bound=BaseModel)


def once(
    path: Path, kind: type[Output], compute: Callable[[], Output], *, valid: Callable[[Output], bool] | None = None
) -> Output:
    """The output at `path`, computed and written first where `stored` finds none.

    The folder is named by the content of what goes in: equal input finds its output, changed input does not.
    """
    found = stored(path, kind, valid=valid)
    if found is None:
        found = compute()
        write_atomically(path, found.model_dump_json())
    return found


def stored(path: Path, kind: type[Output], *, valid: Callable[[Output], bool] | None = None) -> Output | None:
    """The output at `path`; None where there is none. One that makes no sense is moved aside and named in the log.

    An output may name what lies elsewhere: one of which `valid` says that this is gone is deleted. Raises StorageError
    where the disk does not give it.
    """
    found = _read(path, kind)
    if found is None or valid is None or valid(found):
        return found
    get_logger("batch").warning("what this file names is gone or damaged: it is made again", file=str(path))
    path.unlink(missing_ok=True)
    return None


def _read(path: Path, kind: type[Output]) -> Output | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        aside = path.with_name(f"{path.name}.unreadable")
        path.replace(aside)
        get_logger("batch").warning("this file cannot be read: it is made again", file=str(path), kept=str(aside))
        return None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror})", hint="check the disk, then repeat") from None


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
        """(stage, done, total); ("wait", 0, 0) before the job has started, or where the file cannot be understood."""
        try:
            at = json.loads(self._path.read_bytes())
            return str(at["stage"]), int(at["done"]), int(at["total"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return "wait", 0, 0

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        write_atomically(self._path, json.dumps({"stage": stage, "done": done, "total": total}))
