"""`make demo`: a night from requests to registered hotfixes, on the shipped models, on a Ray of its own."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import numpy as np
import platformdirs
import psutil
from PIL import Image

from expunge.files import make_private

BIN = Path(sys.executable).parent
JOBS = Path(__file__).parent
START_TIMEOUT_S = 300
PREFIX = "expunge-ray-"


def main() -> int:
    home = Path(os.environ.get("EXPUNGE_HOME") or platformdirs.user_data_dir("expunge"))
    home = home / "demo" / datetime.now().strftime("%Y%m%d-%H%M%S")
    make_private(home)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that Ray and its folders are cleared away, too
    environment = environment_for(home)
    started = time.monotonic()
    with local_ray(environment) as address:
        environment["EXPUNGE_RAY_ADDRESS"] = address
        print(f"Ray is up at {address} after {time.monotonic() - started:.0f} s", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            expunge(environment, "submit", "--batch", str(write_requests(Path(folder))))
        code = expunge(environment, "night", "--jobs", str(JOBS))
    for batch in (home / "runs").glob("night-*"):
        expunge(environment, "report", batch.name, "--output", str(home / "report.html"))
    print(f"home     EXPUNGE_HOME={home}")
    print(f"took     {time.monotonic() - started:.0f} s")
    return code


def environment_for(home: Path) -> dict[str, str]:
    """What commands and Ray need to work in a home, with a token of its own."""
    return {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # Ray starts jobs with the `python` it finds there
        "EXPUNGE_HOME": str(home),
        # Ray's servers listen where the node's address is: without a cluster, on the loopback interface alone.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }


def write_requests(folder: Path) -> Path:
    """Five removal requests as their senders would write them: three faces, and two flags that are drawn wrong."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of an absent torchvision that nothing here uses
    from expunge.testbed import faces, flags

    people = ((faces.images()[:, 0].numpy() + 1) * 127.5).round().astype(np.uint8)
    banners, names = flags.images()
    banners = ((banners.numpy() + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)
    requests: list[dict[str, object]] = []

    def save(name: str, picture: np.ndarray) -> str:
        Image.fromarray(picture).save(folder / name)
        return name

    for person in (3, 41):
        requests.append(
            {"model": "faces", "images": [save(f"face-{person}.png", people[person])], "external_id": f"face-{person}"}
        )
    given = {"images": [save("face-76.png", people[76])], "surrogates": [save("other.png", people[90])]}
    requests.append({"model": "faces", "external_id": "face-76", "reason": "the sender brings the surrogate", **given})
    for wrong, right in (("Canada", "Peru"), ("Greece", "Uruguay")):
        pictures = [save(f"{name}.png", banners[names.index(name)]) for name in (wrong, right)]
        requests.append(
            {
                "model": "flags",
                "images": pictures[:1],
                "surrogates": pictures[1:],
                "prompt": flags.caption(wrong),
                "external_id": f"flag-of-{wrong}",
            }
        )
    path = folder / "requests.jsonl"
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return path


def expunge(environment: dict[str, str], *arguments: str) -> int:
    return subprocess.run([BIN / "expunge", *arguments], env=environment, check=False).returncode


@contextmanager
def local_ray(environment: dict[str, str]) -> Iterator[str]:
    """A head node on free ports of the loopback interface, with token authentication; at the end nothing of it is left.

    Ray makes its folders writable for everybody, and runs the working directory that it unpacks there with our key and
    token: hence a folder around them that only we can enter.
    """
    port, dashboard, client, agent, metrics = free_ports(5)
    command = [BIN / "ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--metrics-export-port={metrics}"]
    command += [f"--ray-client-server-port={client}", "--disable-usage-stats", "--num-gpus=0"]
    # A second Ray on this host would find the default port in use, and then take no job.
    command += [f"--dashboard-agent-listen-port={agent}"]
    # Two jobs of two workers side by side: while one waits for its imports, the other computes.
    command += [f"--num-cpus={max(4, os.cpu_count() or 1)}", "--min-worker-port=20000", "--max-worker-port=29999"]
    sweep()
    # Ray starts a job on the cluster that its temporary folder names: of two in one folder, on the newer.
    private = tempfile.TemporaryDirectory(prefix=PREFIX, dir="/tmp", ignore_cleanup_errors=True)
    with private as folder, tempfile.TemporaryFile() as log:
        command += [f"--temp-dir={folder}/ray"]
        ray = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        (Path(folder) / "pids").write_text(f"{os.getpid()} {ray.pid}")
        try:
            wait_for(dashboard, ray)
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            stop(psutil.Process(ray.pid))


def sweep() -> None:
    """End the Rays of demos that were killed, and delete what they have left."""
    for folder in Path("/tmp").glob(f"{PREFIX}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            demo, ray = (int(word) for word in (folder / "pids").read_text().split())
        except (OSError, ValueError):
            continue  # not ours to judge: it may be starting
        if psutil.pid_exists(demo):
            continue
        with suppress(psutil.NoSuchProcess):
            head = psutil.Process(ray)
            if f"--temp-dir={folder}/ray" in head.cmdline():
                stop(head)
        shutil.rmtree(folder, ignore_errors=True)


def stop(head: psutil.Process) -> None:
    """End a head node and whatever it started: alone it waits half a minute for detached actors; agents outlive it."""
    everything = [head, *head.children(recursive=True)]
    head.terminate()
    _, left = psutil.wait_procs(everything, timeout=3)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=10)


def wait_for(port: int, ray: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and ray.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise SystemExit("error: Ray did not start: run `ray start --head --block` to see why")


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


if __name__ == "__main__":
    sys.exit(main())
