"""The server as a process on a socket: bodies that are too large or too slow, repeats at a time, logs, and its end."""

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest

from expunge.cli import run
from expunge.requests.store import RequestStore
from expunge.settings import load_settings
from tests.service.conftest import Headers, Server, files, is_problem, picture

Token = Callable[..., Headers]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPUNGE_SERVICE__MAX_BODY", "1000000")
    monkeypatch.setenv("EXPUNGE_SERVICE__BODY_SECONDS", "2")
    monkeypatch.setenv("EXPUNGE_SERVICE__BURST", "1000")
    monkeypatch.setenv("EXPUNGE_SERVICE__CONCURRENT", "12")


def test_a_body_is_cut_off_while_it_arrives(server: Server, token: Token, store: RequestStore) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n'
        while sent < 400_000_000:
            sent += 100_000
            yield bytes(100_000)

    headers = {**token(), "Content-Type": "multipart/form-data; boundary=x"}
    with suppress(httpx2.TransportError):  # it may be hung up on while it is still sending
        assert is_problem(httpx2.post(f"{server.url}/v1/removals", headers=headers, content=endless(), timeout=30), 413)
    assert sent < 100_000_000
    assert httpx2.get(f"{server.url}/healthz").status_code == 200


def test_a_body_that_says_it_is_too_large_is_not_read(server: Server, token: Token) -> None:
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as wire:
        head = "".join(f"{name}: {value}\r\n" for name, value in token().items())
        wire.sendall(f"POST /v1/removals HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n{head}\r\n".encode())
        answer = wire.recv(10_000).decode()
    assert answer.startswith("HTTP/1.1 413")
    assert "application/problem+json" in answer


def test_a_body_that_does_not_arrive(server: Server, token: Token) -> None:
    parts = urlsplit(server.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as wire:
        head = "".join(f"{name}: {value}\r\n" for name, value in token().items())
        head += "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000\r\n"
        wire.sendall(f"POST /v1/removals HTTP/1.1\r\nHost: x\r\n{head}\r\n--x".encode())
        assert wire.recv(10_000).decode().startswith("HTTP/1.1 408")


def test_only_so_many_at_a_time_but_probes_are_always_answered(server: Server, token: Token) -> None:
    parts, headers = urlsplit(server.url), token()
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head += "Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 1000\r\n"
    with ExitStack() as wires:
        for _ in range(12):
            wire = wires.enter_context(socket.create_connection((parts.hostname, parts.port), timeout=20))
            wire.sendall(f"POST /v1/removals HTTP/1.1\r\nHost: x\r\n{head}\r\n--x".encode())
        until = time.monotonic() + 1.5
        while (answer := httpx2.get(f"{server.url}/v1/removals", headers=headers)).status_code == 200:
            assert time.monotonic() < until
        assert is_problem(answer, 503, "too many")
        assert httpx2.get(f"{server.url}/readyz").status_code == 200


def test_idempotency(server: Server, token: Token, store: RequestStore) -> None:
    headers, url = token(), f"{server.url}/v1/removals"

    def post(key: str, name: str, who: Headers = headers) -> httpx2.Response:
        data = {"model": "flags", "external_id": name}
        return httpx2.post(url, headers={**who, "Idempotency-Key": key}, data=data, files=files(name), timeout=60)

    first, again = post("k", "a"), post("k", "a")
    assert first.status_code == again.status_code == 201
    assert first.content == again.content
    assert is_problem(post("k", "b"), 422, "Idempotency-Key")
    assert post("k", "b", token("other")).status_code == 201
    assert is_problem(post("k\x7f", "b"), 422, "ASCII")
    assert store.total() == 2
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post("many", "m"), range(16)))
    made = [answer for answer in answers if answer.status_code == 201]
    assert made
    assert {answer.status_code for answer in answers} <= {201, 409}
    assert {answer.content for answer in made} == {made[0].content}
    assert post("many", "m").content == made[0].content
    assert store.total() == 3


def test_a_refusal_frees_its_key_and_a_day_frees_every_key(server: Server, token: Token, store: RequestStore) -> None:
    headers, url = {**token(), "Idempotency-Key": "k"}, f"{server.url}/v1/removals"
    assert httpx2.post(url, headers=headers, data={"model": "nobody"}, files=files()).status_code == 422
    assert httpx2.post(url, headers=headers, data={"model": "flags"}, files=files()).status_code == 201
    with store.database.write() as connection:
        connection.exec_driver_sql("UPDATE idempotency SET created = '2001-01-01 00:00:00'")
    assert httpx2.post(url, headers=headers, data={"model": "faces"}, files=files("b")).status_code == 201


def test_the_same_request_at_a_time_is_one(server: Server, token: Token, store: RequestStore) -> None:
    headers = token()

    def post(number: int) -> str:
        data = {"model": "flags", "external_id": f"ticket-{number % 5}"}
        answer = httpx2.post(
            f"{server.url}/v1/removals", headers=headers, data=data, files=files(f"{number % 5}"), timeout=60
        )
        assert answer.status_code in (200, 201), answer.text
        return answer.json()["id"]

    with ThreadPoolExecutor(10) as pool:
        ids = list(pool.map(post, range(40)))
    assert len({*ids}) == 5 == store.total()
    assert store.verify_audit().problem is None


def test_no_marker_is_in_the_log(server: Server, token: Token, store: RequestStore) -> None:
    headers, marker = token(), "marker-4711-Zoe"
    data = {"model": "flags", "external_id": marker, "prompt": marker, "reason": marker}
    parts = [("images", (f"{marker}.png", picture("a")))]
    url = f"{server.url}/v1/removals"
    id = httpx2.post(url, headers={**headers, "Idempotency-Key": marker}, data=data, files=parts).json()["id"]
    httpx2.post(url, headers=headers, data={**data, "prompt": "another"}, files=parts)
    httpx2.post(url, headers=headers, data={**data, marker: marker}, files=parts)
    httpx2.post(url, headers={**headers, "Content-Type": f"multipart/form-data; boundary={marker}"}, content=marker)
    httpx2.get(f"{url}/{marker}?q={marker}", headers={**headers, "User-Agent": marker, "Referer": marker})
    httpx2.get(f"{url}?model={marker}&state={marker}", headers=headers)
    httpx2.get(url, headers={"Authorization": f"Bearer {marker}"})
    httpx2.request(marker, f"{server.url}/{marker}")
    lines = [json.dumps({"model": marker, "images": [marker]})]
    httpx2.post(f"{url}/batch", headers=headers, files=[("requests", (marker, "\n".join(lines)))])
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(30)
    log = server.log.read_text()
    assert log.count('"answered"') >= 8
    secret = headers["Authorization"].split("_", 2)[2]
    for word in (marker, "4711", secret, id):
        assert word not in log
    home = [path for path in load_settings().home.rglob("*") if path.is_file()]
    assert len(home) > 3
    assert not [path for path in home if marker.encode() in path.read_bytes()]


def test_sigterm_lets_what_has_begun_end(server: Server, token: Token, store: RequestStore) -> None:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nflags\r\n'
        b'--x\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n'
    ) + picture("a")
    begun, go = threading.Event(), threading.Event()

    def slowly() -> Iterator[bytes]:
        yield body
        begun.set()
        go.wait(10)
        yield b"\r\n--x--\r\n"

    headers = {**token(), "Content-Type": "multipart/form-data; boundary=x"}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx2.post, f"{server.url}/v1/removals", headers=headers, content=slowly(), timeout=30)
        assert begun.wait(10)
        server.process.send_signal(signal.SIGTERM)
        threading.Event().wait(0.5)
        go.set()
        assert answer.result().status_code == 201
    assert server.process.wait(30) == 0
    assert store.total() == 1


def test_the_committed_openapi_document_is_the_apps(capfd: pytest.CaptureFixture[str]) -> None:
    """`expunge serve --print-openapi > docs/openapi.json` writes it again."""
    assert run(["serve", "--print-openapi"]) == 0
    assert json.loads(capfd.readouterr().out) == json.loads((ROOT / "docs/openapi.json").read_text())
