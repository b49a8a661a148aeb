"""Process groups of gloo ranks for tests: DeepSpeed holds global state, so it lives in processes of its own."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Catches a hang and nothing else: a machine that has other work makes a group several times slower.
TIMEOUT_S = 1500

# For tests that start groups: pytest's own limit must lie above those of all the groups that a fixture starts.
starts_groups = pytest.mark.timeout(5 * TIMEOUT_S)


def run_group(script: str, *arguments: str, world: int, logs: Path, **environment: str) -> None:
    """Run a script of this folder on `world` ranks until all have ended.

    Fails with the log of the first rank that fails, at once: the others would wait for it.
    """
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    port = _free_port()
    started: list[tuple[Path, subprocess.Popen[str]]] = []
    for rank in range(world):
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            **environment,
        }
        log = logs / f"{Path(script).stem}-world{world}-rank{rank}.log"
        with log.open("w") as file:
            process = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT, text=True)
        started.append((log, process))
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while running := [process for _, process in started if process.poll() is None]:
            _check(started)
            assert time.monotonic() < deadline, f"{len(running)} ranks of {script} have not ended after {TIMEOUT_S} s"
            time.sleep(0.1)
        _check(started)
    finally:
        for _, process in started:
            process.kill()
            process.wait()


def _check(started: list[tuple[Path, subprocess.Popen[str]]]) -> None:
    for log, process in started:
        assert not process.returncode, log.read_text()[-4000:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
