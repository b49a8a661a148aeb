"""The parent's side of the decoding process: one for all pictures, started with the first, replaced when it ends."""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from typing import IO

from PIL import Image

from expunge.errors import ExpungeError, InputError
from expunge.requests.decoding.child import ANSWER, ASK, PICTURE, READY, REFUSED

SECONDS = 10
"""Seconds of computing per picture, plus one per megapixel that `max_pixels` allows; 32 megapixels take 2 to 5."""

START_SECONDS = 60
_LARGEST_REFUSAL = 10_000
_SLOW_MACHINE = 4
"""The limit on the clock is this many times longer, since others may be computing too."""

_COMMAND = (sys.executable, "-P", "-m", "expunge.requests.decoding.child")
_KEPT = ("LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR")


class Decoder:
    """Decodes in a process of its own; safe to share between threads, which then take turns."""

    def __init__(self, *, seconds: float = SECONDS, command: tuple[str, ...] = _COMMAND) -> None:
        self._seconds = seconds
        self._command = command
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def decode(self, data: bytes, max_pixels: int) -> Image.Image:
        """Returns an upright sRGB image, mode RGB. Raises InputError whose message follows the file's name."""
        with self._lock:
            seconds = self._seconds + max_pixels / 1e6
            process = self._running()
            try:
                return _ask(process, data, max_pixels, seconds)
            except TimeoutError:
                self.close()
                raise _too_slow(seconds) from None
            except EOFError:
                code = _exit_code(process)
                self.close()
                raise _ended(code, seconds) from None
            except InputError:
                raise
            except BaseException:  # half an answer may be left in the pipe
                self.close()
                raise

    def close(self) -> None:
        """End the process; the next picture starts another."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self.close()
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
        try:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env=environment,
            )
        except OSError as error:
            raise _no_start(str(error)) from None
        if not self._owner:
            atexit.register(self.close)
        self._process, self._owner = process, os.getpid()
        os.set_blocking(_pipe(process.stdin).fileno(), False)
        try:
            ready = _read(_pipe(process.stdout), len(READY), time.monotonic() + START_SECONDS)
        except (EOFError, TimeoutError):
            ready = b""
        if ready != READY:
            self.close()
            raise _no_start("it does not answer")
        return process


def _ask(process: subprocess.Popen[bytes], data: bytes, max_pixels: int, seconds: float) -> Image.Image:
    """Reads numbers, not a file: nothing of the picture is parsed again on this side."""
    deadline = time.monotonic() + _SLOW_MACHINE * seconds
    to, back = _pipe(process.stdin), _pipe(process.stdout)
    try:
        _write(to, ASK.pack(len(data), max_pixels, max(1, round(seconds))), deadline)
        _write(to, data, deadline)
    except BrokenPipeError:
        raise EOFError from None
    kind, first, second = ANSWER.unpack(_read(back, ANSWER.size, deadline))
    if kind == PICTURE and 0 < first * second <= max_pixels:
        pixels = _read(back, 3 * first * second, deadline)
        return Image.frombuffer("RGB", (first, second), pixels, "raw", "RGB", 0, 1)
    if kind == REFUSED and first <= _LARGEST_REFUSAL:
        raise _refusal(_read(back, first, deadline), process)
    process.kill()
    raise EOFError


def _refusal(told: bytes, process: subprocess.Popen[bytes]) -> InputError:
    try:
        message, hint = json.loads(told)
    except (ValueError, TypeError):
        process.kill()
        raise EOFError from None
    return InputError(str(message), hint=str(hint))


def _write(to: IO[bytes], data: bytes, deadline: float) -> None:
    rest = memoryview(data)
    while rest:
        _wait(to, select.POLLOUT, deadline)
        rest = rest[os.write(to.fileno(), rest) :]


def _read(back: IO[bytes], length: int, deadline: float) -> bytes:
    whole = bytearray(length)
    rest = memoryview(whole)
    while rest:
        _wait(back, select.POLLIN, deadline)
        part = os.read(back.fileno(), min(len(rest), 1 << 20))
        if not part:
            raise EOFError
        rest[: len(part)] = part
        rest = rest[len(part) :]
    return bytes(whole)


def _wait(pipe: IO[bytes], event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _exit_code(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None, "both are pipes"
    return pipe


def _too_slow(seconds: float) -> InputError:
    return InputError(f"takes more than {seconds:.0f} seconds to decode", hint="save it again as a plain PNG")


def _ended(code: int, seconds: float) -> InputError:
    if code == -signal.SIGXCPU:
        return _too_slow(seconds)
    why = f"signal {-code}" if code < 0 else f"code {code}"
    return InputError(f"made the decoder fail ({why})", hint="save it again as a plain PNG")


def _no_start(why: str) -> ExpungeError:
    return ExpungeError(f"the picture decoder does not start: {why}", hint="check that this Python can start processes")
