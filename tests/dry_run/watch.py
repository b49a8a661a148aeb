"""What a night does while it runs: each stage's time, its processes' memory, and the networks that they read and free.

The stage is in the job's progress file, memory in /proc, and the networks in the debug lines that `families.components`
writes to the logs of Ray's workers.
"""

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from pydantic import BaseModel

from expunge.runs.progress import Progress
from tests.watching import processes, with_children, words

EVERY_S = 0.5
READ, FREED = "read a network", "freed a network"


class Memory(BaseModel):
    """Bytes of one process in one stage."""

    before: int
    """Resident when it read its first network."""
    peak: int = 0
    """Resident at most, mapped weight files included."""
    own: int = 0
    """Without files, whose pages the system may drop at any time, at most."""


class Stage(BaseModel):
    """What was seen of one stage, over all starts of a run."""

    seconds: float = 0.0
    processes: dict[str, Memory] = {}
    """Those that hold networks, by title and id."""
    total: int = 0
    """Peak bytes of all processes together, without files."""
    read: list[str] = []
    """The networks in the order in which they were read."""
    together: list[list[str]] = []
    """Every set of networks that one process held at once."""


class Record(BaseModel):
    """What was seen of a run; it is kept in a file, because a run may have several starts."""

    stages: dict[str, Stage] = {}

    @classmethod
    def kept(cls, file: Path) -> "Record":
        return cls.model_validate_json(file.read_bytes()) if file.exists() else cls()


class Watch:
    """Looks at a night every EVERY_S seconds, in a thread of its own."""

    def __init__(self, home: Path, file: Path) -> None:
        """home: of the night. file: where the record is kept."""
        self._home, self._file = home, file
        self.record = Record.kept(file)
        self._now = "plan"
        self._at: dict[Path, int] = {}
        self._held: dict[int, set[str]] = {}
        self._resident: dict[int, int] = {}
        self._over = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
            self._file.write_text(self.record.model_dump_json(indent=1))

    def _run(self) -> None:
        last = time.monotonic()
        while not self._over.wait(EVERY_S):
            stage, found = self._stage(), with_children(processes(self._home))
            self._networks(stage, found)
            self._memory(stage, found)
            now = time.monotonic()
            stage.seconds += now - last
            last = now

    def _stage(self) -> Stage:
        for file in self._home.glob("runs/*/*/progress.json"):
            with suppress(OSError):
                now = Progress(file).read()[0]
                if now != self._now:
                    print(f"{time.strftime('%H:%M:%S')}  {now}", flush=True)
                self._now = now
        return self.record.stages.setdefault(self._now, Stage())

    def _memory(self, stage: Stage, found: set[psutil.Process]) -> None:
        total = 0
        for process in found:
            with suppress(psutil.Error, OSError):
                resident, own = _resident(process.pid)
                total += own
                if process.pid not in self._held:
                    self._resident[process.pid] = resident
                    continue
                if not self._held[process.pid]:
                    continue
                name = f"{''.join(words(process)[:1]).strip()} ({process.pid})"
                memory = stage.processes.setdefault(name, Memory(before=self._resident.get(process.pid, 0)))
                memory.peak, memory.own = max(memory.peak, resident), max(memory.own, own)
        stage.total = max(stage.total, total)

    def _networks(self, stage: Stage, found: set[psutil.Process]) -> None:
        """Follow what the workers of this Ray write to their logs."""
        given = {word for process in found for word in words(process) if word.startswith("--temp-dir=")}
        for folder in (Path(word.removeprefix("--temp-dir=")) for word in given):
            # session_latest is a link to the newest one; a line that is read twice would bring networks back.
            for file in {path.resolve() for path in folder.glob("session_*/logs/worker-*.err")}:
                pid = int(re.findall(r"\d+", file.stem)[-1])
                with suppress(OSError), file.open() as lines:
                    lines.seek(self._at.get(file, 0))
                    # The last line may be half written: it is read whole the next time.
                    while (line := lines.readline()).endswith("\n"):
                        self._at[file] = lines.tell()
                        self._event(stage, pid, line)

    def _event(self, stage: Stage, pid: int, line: str) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            return
        if not isinstance(event, dict) or event.get("event") not in (READ, FREED):
            return
        held = self._held.setdefault(pid, set())
        if event["event"] == FREED:
            held.discard(event["network"])
            return
        held.add(event["network"])
        stage.read.append(event["network"])
        if sorted(held) not in stage.together:
            stage.together.append(sorted(held))


def _resident(pid: int) -> tuple[int, int]:
    """Return the resident bytes of a process, and those of them that no file stands behind."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    resident, own = (int(lines[name].split()[0]) * 1024 if name in lines else 0 for name in ("VmRSS", "RssAnon"))
    return resident, own
