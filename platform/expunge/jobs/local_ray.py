"""Start a Ray on this machine for as long as it is needed: only this user can reach it, and nothing of it remains."""

import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
START_TIMEOUT_S = 300
# Every port that Ray listens on. Those that it would choose by itself are of the kind that any connection on this
# machine may take meanwhile; then the agent cannot listen, and the whole node ends.
PORT_OPTIONS = (
    "port",
    "dashboard-port",
    "ray-client-server-port",
    "metrics-export-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "object-manager-port",
    "node-manager-port",
)
PORTS = range(10000, 20000)
"""Below the workers' ports, and below those that Linux hands out to connections."""
PREFIX = "expunge-ray-"


def environment_for(home: Path) -> dict[str, str]:
    """Return the environment in which the commands and Ray work on `home`, with a new token."""
    return {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # Ray starts jobs with the `python` that it finds there
        "EXPUNGE_HOME": str(home),
        # Ray's servers listen on the node's address: without a cluster, that is the loopback interface.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }


@contextmanager
def local_ray(environment: dict[str, str], *, gpus: int = 0) -> Iterator[str]:
    """Run a head node on free ports of the loopback interface, with token authentication; yield its job server's URL.

    Ray makes its folders writable for everybody, and code in them runs with our key and token, so they are put into a
    folder that only this user can enter. gpus: how many Ray shall count, whatever the machine has.
    """
    ports = dict(zip(PORT_OPTIONS, free_ports(len(PORT_OPTIONS)), strict=True))
    command = [BIN / "ray", "start", "--head", "--block", *(f"--{name}={port}" for name, port in ports.items())]
    command += [
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1",
        "--disable-usage-stats",
        f"--num-gpus={gpus}",
    ]
    # Enough for two jobs of two workers: while one waits for its imports, the other computes.
    command += [f"--num-cpus={max(4, os.cpu_count() or 1)}", "--min-worker-port=20000", "--max-worker-port=29999"]
    sweep()
    # Ray starts a job on the newest cluster in its temporary folder, so each Ray has a folder of its own.
    private = tempfile.TemporaryDirectory(prefix=PREFIX, dir="/tmp", ignore_cleanup_errors=True)
    with private as folder, tempfile.TemporaryFile() as log:
        command += [f"--temp-dir={folder}/ray"]
        ray = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        (Path(folder) / "pids").write_text(f"{os.getpid()} {ray.pid}")
        try:
            # The job server first, and then the agent without which it accepts no job.
            for name in ("dashboard-port", "dashboard-agent-listen-port"):
                wait_for(ports[name], ray)
            yield f"http://127.0.0.1:{ports['dashboard-port']}"
        finally:
            with suppress(psutil.NoSuchProcess):  # it ended by itself: `wait_for` says so
                stop(psutil.Process(ray.pid))


def sweep() -> None:
    """Stop the Rays whose starter was killed, and delete their folders."""
    for folder in Path("/tmp").glob(f"{PREFIX}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            starter, ray = (int(word) for word in (folder / "pids").read_text().split())
        except (OSError, ValueError):
            continue  # it may be another user's, or just starting
        if psutil.pid_exists(starter):
            continue
        with suppress(psutil.NoSuchProcess):
            head = psutil.Process(ray)
            if f"--temp-dir={folder}/ray" in head.cmdline():
                stop(head)
        shutil.rmtree(folder, ignore_errors=True)


def stop(head: psutil.Process) -> None:
    """Stop a head node and everything it started.

    Ray itself would wait half a minute for detached actors, and leave its agents running.
    """
    everything = [head, *head.children(recursive=True)]
    head.terminate()
    _, left = psutil.wait_procs(everything, timeout=3)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)


def wait_for(port: int, ray: subprocess.Popen[bytes]) -> None:
    """Wait until Ray accepts connections at a port. Raises SystemExit if Ray ends first, or takes START_TIMEOUT_S."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and ray.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise SystemExit("error: Ray did not start: run `ray start --head --block` to see why")


def free_ports(count: int) -> list[int]:
    """Return different ports of the loopback interface that are free at the moment."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            found.append(port)
        if len(found) == count:
            return found
    raise SystemExit(f"error: no {count} ports from {PORTS.start} to {PORTS.stop - 1} are free on this machine")
