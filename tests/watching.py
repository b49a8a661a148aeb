"""What is watched while something runs: a condition, the figures of a training, the processes of a home."""

import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

T = TypeVar("T")

FIGURES = "figures.jsonl"
HANGS_S = 900.0
"""What has not happened after this long is called hung. No wait for something that should happen has a shorter limit:
it costs nothing where all is well, and a busy machine needs a good part of it."""

GRACE_S = 120.0
"""How long processes that were told to end may take, as on a machine that has no time for them."""


def wait_until(condition: Callable[[], T], what: str) -> T:
    """What the condition returns once that is true."""
    deadline = time.monotonic() + HANGS_S
    while not (found := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {HANGS_S:.0f} s for {what}")
        time.sleep(0.2)  # a look at every process costs some hundredths
    return found


@dataclass(frozen=True)
class Recorder:
    """What a training calls with its figures: it writes them down in a folder."""

    folder: Path

    def __call__(self, step: int, figures: dict[str, float]) -> None:
        with (self.folder / FIGURES).open("a") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")


def recorded(folder: Path) -> list[dict[str, float]]:
    path = folder / FIGURES
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def processes(home: Path) -> list[psutil.Process]:
    """Those that were started with this home: another Ray of the same user is not ours to kill."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("EXPUNGE_HOME") == str(home) and is_alive(process):
                found.append(process)
    return found


def training_workers(home: Path) -> list[psutil.Process]:
    return [process for process in processes(home) if any("RayTrainWorker" in word for word in words(process))]


def task_process(home: Path, name: str) -> psutil.Process | None:
    """The worker that runs a Ray task of this name: Ray gives its process that title."""
    return next((p for p in processes(home) if "".join(words(p)[:1]).strip() == f"ray::{name}"), None)


def words(process: psutil.Process) -> list[str]:
    """Its command line; none where it has ended."""
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def with_children(found: Iterable[psutil.Process]) -> set[psutil.Process]:
    """Some of Ray's own overwrite their environment."""
    everything: set[psutil.Process] = set()
    for process in found:
        with suppress(psutil.Error):
            everything |= {process, *process.children(recursive=True)}
    return everything


def left_over(watched: Iterable[psutil.Process]) -> list[str]:
    """Those that do not end by themselves. They are killed, so that a failing test leaves nothing behind either."""
    deadline = time.monotonic() + GRACE_S
    while (left := list(filter(is_alive, watched))) and time.monotonic() < deadline:
        time.sleep(0.2)
    names = [f"{process.pid} {' '.join(words(process)[:1])}" for process in left]
    for process in left:
        with suppress(psutil.Error):
            process.kill()
    return names


def is_alive(process: psutil.Process) -> bool:
    """A zombie has ended, though nobody has asked for its exit code."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
