"""Process groups of gloo ranks for tests: DeepSpeed holds global state, so it lives in processes of its own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

TIMEOUT_S = 500


def run_group(script: str, *arguments: str, world: int, logs: Path, **environment: str) -> None:
    """Run a script of this folder on `world` ranks until all end; fails with the log of one that does not end well."""
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
        for log, process in started:
            code = process.wait(timeout=TIMEOUT_S)
            assert code == 0, log.read_text()[-4000:]
    finally:
        for _, process in started:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
