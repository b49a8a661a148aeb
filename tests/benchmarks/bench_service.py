"""Load on `expunge serve`: submits at a rate from several processes over a socket, and counts what came of it.

    python -m tests.benchmarks.bench_service --rate 200 --seconds 60

Every submission is a picture of its own with an Idempotency-Key, and one in ten is sent twice at the same time.
Latency counts from the moment at which a submission was due, so that a server that falls behind cannot hide it.
"""

import argparse
import io
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass

import httpx2
import numpy as np
from PIL import Image

from expunge.requests.store import open_store
from expunge.service import tokens
from expunge.settings import load_settings

THREADS = 16
"""In each client process."""
TWICE = 10
"""One in so many is sent twice."""


@dataclass(frozen=True)
class Sent:
    name: str
    seconds: float
    status: int
    id: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=200, help="submissions per second")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--processes", type=int, default=2, help="of clients")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="expunge-bench-") as folder:
        os.environ.setdefault("EXPUNGE_HOME", f"{folder}/home")
        os.environ |= {"EXPUNGE_SERVICE__RATE": "1e6", "EXPUNGE_SERVICE__BURST": "1000000"}
        os.environ |= {"EXPUNGE_SERVICE__CONCURRENT": "1000", "EXPUNGE_LOG_LEVEL": "warning"}
        store = open_store(load_settings())
        token, before = tokens.create(store, "bench", ["submit"], None), store.total()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = subprocess.Popen([sys.executable, "-m", "expunge", "serve", "--port", str(port)])
        try:
            wait_for(f"http://127.0.0.1:{port}/readyz")
            share, start = given.rate / given.processes, time.time() + 2
            with ProcessPoolExecutor(given.processes) as pool:
                jobs = [
                    pool.submit(send, port, token, share, given.seconds, start + i / given.rate)
                    for i in range(given.processes)
                ]
                sent = [each for job in jobs for each in job.result()]
            took = time.time() - start
        finally:
            server.terminate()
            server.wait(60)
        report(sent, store.total() - before, took, given.rate, store.verify_audit().problem)


def wait_for(url: str) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            if httpx2.get(url, timeout=5).status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.1)
    raise SystemExit("the server did not start")


def send(port: int, token: str, rate: float, seconds: float, start: float) -> list[Sent]:
    """Sends in one process, each submission at its own time, whatever became of those before it."""
    limits = httpx2.Limits(max_connections=2 * THREADS, max_keepalive_connections=2 * THREADS)
    with (
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=60, trust_env=False) as client,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        waiting = []
        for number in range(round(rate * seconds)):
            due = start + number / rate
            time.sleep(max(0.0, due - time.time()))
            name, picture = secrets.token_hex(8), painted()
            for _ in range(2 if number % TWICE == 0 else 1):
                waiting.append(pool.submit(submit, client, token, name, picture, due))
        return [each.result() for each in waiting]


def submit(client: httpx2.Client, token: str, name: str, picture: bytes, due: float) -> Sent:
    headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": name}
    data, files = {"model": "flags", "external_id": name}, [("images", ("a.png", picture))]
    try:
        answer = client.post("/v1/removals", headers=headers, data=data, files=files)
    except httpx2.HTTPError:
        return Sent(name, time.time() - due, 0, "")
    id = answer.json()["id"] if answer.status_code in (200, 201) else ""
    return Sent(name, time.time() - due, answer.status_code, id)


def painted() -> bytes:
    out = io.BytesIO()
    colours = np.frombuffer(secrets.token_bytes(32 * 48 * 3), np.uint8).reshape(32, 48, 3)
    Image.fromarray(colours).save(out, "PNG", compress_level=1)
    return out.getvalue()


def report(sent: list[Sent], stored: int, took: float, rate: float, problem: str | None) -> None:
    answered: dict[str, set[str]] = {}
    for each in sent:
        if each.id:
            answered.setdefault(each.name, set()).add(each.id)
    ids = {id for found in answered.values() for id in found}
    seconds = sorted(each.seconds for each in sent if each.id)
    names = {each.name for each in sent}
    # One that was stored and answered with a failure is neither: to send it again is safe.
    lost = max(0, len(ids) - stored)
    doubled = sum(len(found) > 1 for found in answered.values()) + max(0, stored - len(names))
    print(
        json.dumps(
            {
                "cores": os.cpu_count(),
                "load": [round(each, 1) for each in os.getloadavg()],
                "asked_per_second": rate,
                "reached_per_second": round(len(answered) / took, 1),
                "submissions": len(names),
                "statuses": {str(status): count for status, count in Counter(each.status for each in sent).items()},
                "accepted": len(answered),
                "stored": stored,
                "lost": lost,
                "doubled": doubled,
                "p50_ms": round(1000 * float(np.percentile(seconds, 50))) if seconds else None,
                "p99_ms": round(1000 * float(np.percentile(seconds, 99))) if seconds else None,
                "audit": problem or "unbroken",
            },
            indent=2,
        )
    )
    if problem or lost or doubled:
        raise SystemExit("a submission was lost or doubled")


if __name__ == "__main__":
    main()
