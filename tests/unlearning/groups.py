"""Process groups of gloo ranks for tests. DeepSpeed holds global state, so it runs in separate processes."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, cast

import pytest
import torch.distributed as dist

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


def leave() -> NoReturn:
    """End this rank once its results are written, before Python takes itself apart.

    DeepSpeed's references keep gloo's threads alive, and one that still runs then aborts the process:
    https://github.com/pytorch/pytorch/issues/190489.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def selected(request: pytest.FixtureRequest) -> Iterator[tuple[pytest.Function, str, int]]:
    """Yield the tests of this module that were selected and use the fixture, with their variant and number of ranks.

    A module's groups then run what its tests ask for: little in the fast tier, one variant under `-k`.
    """
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.path == request.path and request.fixturename in item.fixturenames:
            yield item, str(item.callspec.params["name"]), cast(int, item.callspec.params["world"])


def _check(started: list[tuple[Path, subprocess.Popen[str]]]) -> None:
    for log, process in started:
        assert not process.returncode, log.read_text()[-4000:]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
