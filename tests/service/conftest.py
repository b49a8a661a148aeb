"""The service over a home of its own: in this process, and as a process on a loopback port."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from expunge.requests.blobs import BlobStore, open_blobs
from expunge.requests.store import RequestStore, open_store
from expunge.service import tokens
from expunge.service.app import create_service
from expunge.settings import Settings, load_settings

Headers = dict[str, str]


@pytest.fixture
def settings() -> Settings:
    return load_settings()


@pytest.fixture
def store(settings: Settings) -> Iterator[RequestStore]:
    opened = open_store(settings)
    yield opened
    opened.close()


@pytest.fixture
def blobs(settings: Settings) -> BlobStore:
    return open_blobs(settings)


@pytest.fixture
def client(settings: Settings, store: RequestStore, blobs: BlobStore) -> TestClient:
    return TestClient(create_service(settings, store, blobs), raise_server_exceptions=False)


@pytest.fixture
def token(store: RequestStore) -> Callable[..., Headers]:
    """The headers of a new token."""

    def make(tenant: str = "acme", *scopes: str) -> Headers:
        return {"Authorization": f"Bearer {tokens.create(store, tenant, scopes or ('submit', 'review'), None)}"}

    return make


def picture(name: str, size: tuple[int, int] = (48, 32)) -> bytes:
    """A PNG of the model's shape; its name decides its content."""
    width, height = size
    colours = np.random.default_rng(list(name.encode())).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(colours).save(out, "PNG")
    return out.getvalue()


def files(name: str = "a", field: str = "images") -> list[tuple[str, tuple[str, bytes]]]:
    return [(field, (f"{name}.png", picture(name)))]


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[bytes]
    log: Path


@pytest.fixture
def server(store: RequestStore, tmp_path: Path) -> Iterator[Server]:
    """`expunge serve` itself, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "server.log"
    command = [sys.executable, "-m", "expunge", "serve", "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ})
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process, log)
        yield Server(url, process, log)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx2.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.1)
    pytest.fail(f"the server did not start: {log.read_text()}")


def is_problem(response: httpx2.Response, status: int, words: str = "") -> bool:
    """True if it is an RFC 9457 problem of this status whose detail or hint has these words."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"
    told = response.json()
    assert told["status"] == status
    assert {"type", "title", "status"} <= set(told) <= {"type", "title", "status", "detail", "hint"}
    assert re.search(words, f"{told.get('detail', '')} {told.get('hint', '')}"), told
    return True
