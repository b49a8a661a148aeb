"""The processes of one home's nights: to end one of them, and to see that none is left."""

import time
from contextlib import suppress
from pathlib import Path

import psutil


def task_process(home: Path, name: str) -> psutil.Process | None:
    """The worker that runs a Ray task of this name: Ray gives its process that title."""
    return next((process for process in processes(home) if _title(process) == f"ray::{name}"), None)


def processes(home: Path) -> list[psutil.Process]:
    """Those that were started with this home: another Ray of the same user is not ours to kill."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.environ().get("EXPUNGE_HOME") == str(home)
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def left_over(home: Path, grace: float = 30) -> list[str]:
    """Those that do not end by themselves. They are killed, so that a failing test leaves nothing behind either."""
    deadline = time.monotonic() + grace
    while (left := processes(home)) and time.monotonic() < deadline:
        time.sleep(0.2)
    names = [f"{process.pid} {_title(process)}" for process in left]
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    return names


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error, IndexError):
        return process.cmdline()[0].strip()
    return ""
