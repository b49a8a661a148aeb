"""Which process this is, and whether another one, known only by what it wrote down, is gone."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class Process:
    """A process as another machine may read of it.

    `node` is the host's name, for people. `place` names the running kernel and the PID namespace in which `pid` means
    this process; it is empty where the system does not tell. `started` counts clock ticks since the machine booted.
    """

    node: str
    place: str
    pid: int
    started: int


def this_process() -> Process:
    pid = os.getpid()
    _, started = _stat(pid) or ("", 0)
    return Process(socket.gethostname(), _place(), pid, started)


def is_gone(process: Process) -> bool:
    """True if the process has certainly ended. False for one of another machine or container, which cannot be seen.

    A killed process that its parent has not collected yet has ended, and so has one whose PID now means another.
    """
    place = _place()
    if not place or (process.node, process.place) != (socket.gethostname(), place):
        return False
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it belongs to another user
    found = _stat(process.pid)
    return found is not None and (found[0] in "ZX" or found[1] != process.started)


def _place() -> str:
    # Containers may share a host's name, but then each has PIDs of its own; a restarted machine reuses them.
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot}/{(_PROC / 'self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, int] | None:
    """The state and the start time. Read from the kernel: a start time in seconds moves when the clock is set."""
    try:
        # 17 (any (name)) S 1 ...: the state is the third field, the start time is the twenty-second.
        fields = (_PROC / str(pid) / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])
