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

STAGES = ("wait", "prepare", "train", "evaluate", "register", "done")
"""Of a job, in order."""

Output = TypeVar("Output", bound=BaseModel)


def once(
    path: Path, kind: type[Output], compute: Callable[[], Output], *, valid: Callable[[Output], bool] | None = None
) -> Output:
    """The output at `path`, computed and written first where `stored` finds none; what lies there is set aside.

    The folder is named by the content of what goes in: equal input finds its output, changed input does not.
    """
    found = stored(path, kind, valid=valid)
    if found is None:
        set_aside(path)
        found = compute()
        write_atomically(path, found.model_dump_json())
    return found


def stored(path: Path, kind: type[Output], *, valid: Callable[[Output], bool] | None = None) -> Output | None:
    """The output at `path`; None where there is none, or one that makes no sense or is not `valid`.

    An output may name what lies elsewhere: `valid` says whether that is there. Raises StorageError where the disk does
    not give the file.
    """
    try:
        found = kind.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror})", hint="check the disk, then repeat") from None
    return found if valid is None or valid(found) else None


def set_aside(path: Path) -> None:
    """Make room for a file that is made again; what is there is kept as `NAME.unreadable` and named in the log."""
    if path.exists():
        aside = path.with_name(f"{path.name}.unreadable")
        path.replace(aside)
        get_logger("batch").warning(
            "this file is damaged, or names what is gone: it is made again", file=str(path), kept=str(aside)
        )


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


def advance(folder: Path) -> int:
    """How far a batch has got: a number that grows with its plan, with each stage of a job and with training steps."""
    jobs = [Progress(path.parent).read() for path in folder.glob("*/progress.json")]
    return (folder / PLAN).exists() + sum(STAGES.index(stage) * 100_000 + min(done, 99_999) for stage, done, _ in jobs)


class Progress:
    """Where a job is: one small JSON file that the waiting command reads."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "progress.json"

    def read(self) -> tuple[str, int, int]:
        """(stage, done, total); ("wait", 0, 0) before the job has started, or where the file cannot be understood."""
        try:
            at = json.loads(self._path.read_bytes())
            stage, done, total = at["stage"], int(at["done"]), int(at["total"])
            return (stage, done, total) if stage in STAGES else ("wait", 0, 0)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return "wait", 0, 0

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        write_atomically(self._path, json.dumps({"stage": stage, "done": done, "total": total}))
