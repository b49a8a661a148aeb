"""Submitting, listing, showing and withdrawing over HTTP, and everything that is refused."""

import io
import json
import zlib
from collections.abc import Callable
from datetime import date, timedelta

import pytest
from starlette.testclient import TestClient

from expunge.requests.blobs import BlobStore
from expunge.requests.store import RequestStore
from expunge.types import RequestState
from tests.service.conftest import Headers, files, is_problem, picture

Token = Callable[..., Headers]


@pytest.fixture
def mine(token: Token) -> Headers:
    return token()


def submit(client: TestClient, headers: Headers, name: str = "a", **fields: str) -> str:
    data = {"model": "flags", "external_id": f"ticket-{name}", **fields}
    response = client.post("/v1/removals", headers=headers, data=data, files=files(name))
    assert response.status_code == 201, response.text
    return response.json()["id"]


def test_a_submission_is_the_same_as_over_the_command_line(
    client: TestClient, mine: Headers, store: RequestStore, blobs: BlobStore
) -> None:
    data = {"model": "flags", "prompt": "a flag", "reason": "court", "priority": "-3", "external_id": " ticket "}
    parts = [*files("a"), *files("b", "surrogates")]
    response = client.post("/v1/removals", headers=mine, data=data, files=parts)
    assert response.status_code == 201
    record = store.get(response.json()["id"])
    assert record.tenant == "acme"
    assert (record.request.prompt, record.request.reason, record.request.priority) == ("a flag", "court", -3)
    assert record.request.external_id == "ticket"
    assert len(record.request.surrogates) == 1
    assert all(blobs.has(blob) for blob in record.request.blobs)
    [event] = record.history
    assert event.reason == "submitted"
    assert event.actor.startswith("acme/token-")
    assert store.verify_audit().problem is None


def test_mask_edit_and_box(client: TestClient, mine: Headers, store: RequestStore) -> None:
    parts = [*files("a"), *files("m", "mask")]
    data = {"model": "flags", "edit": "blend", "box": "0,0,1,0.5"}
    response = client.post("/v1/removals", headers=mine, data=data, files=parts)
    edit = store.get(response.json()["id"]).request.edit
    assert edit is not None
    assert edit.mask is not None


def test_twice_is_once(client: TestClient, mine: Headers, store: RequestStore) -> None:
    id = submit(client, mine)
    data = {"model": "flags", "external_id": "ticket-a"}
    again = client.post("/v1/removals", headers=mine, data=data, files=files("a"))
    assert (again.status_code, again.json()["id"], again.json()["new"]) == (200, id, False)
    assert store.total() == 1


@pytest.mark.parametrize(
    ("data", "parts", "words"),
    [
        ({}, files(), "model"),
        ({"model": "flags"}, files("a", "surrogates"), "images"),
        ({"model": "nobody"}, files(), "model: there is none"),
        ({"model": "../x"}, files(), "model"),
        ({"model": "flags", "colour": "red"}, files(), "colour: there is no such field"),
        ({"model": "flags", "images": "/etc/passwd"}, files(), "images: is not a file"),
        ({"model": "flags", "priority": "11"}, files(), "priority"),
        ({"model": "flags", "priority": "high"}, files(), "priority"),
        ({"model": "flags", "due": "2000-01-01"}, files(), "due"),
        ({"model": "flags", "box": "1,2,3"}, files(), "box"),
        ({"model": "flags", "edit": "blend:mask=/etc/passwd"}, files(), "edit: a mask is a file here"),
        ({"model": "flags", "edit": "nothing"}, files(), "edit"),
        ({"model": "flags"}, [*files(), *files("m", "mask")], "mask"),
        ({"model": "flags"}, [*files(), *files("x", "photo")], "photo: no picture is expected"),
        ({"model": "flags"}, [*files("a"), *files("a", "surrogates")], "same picture"),
        ({"model": "flags"}, [("images", ("a.png", b"GIF89a"))], r"images\[0\] is a GIF"),
        ({"model": "flags"}, [("images", ("a.png", b""))], r"images\[0\]"),
        ({"model": ["flags", "faces"]}, files(), "model is given twice"),
        ({"model": "flags", "external_id": "a\x01b"}, files(), "external_id"),
    ],
)
def test_refused(
    client: TestClient,
    mine: Headers,
    store: RequestStore,
    blobs: BlobStore,
    data: dict[str, str],
    parts: list[tuple[str, tuple[str, bytes]]],
    words: str,
) -> None:
    assert is_problem(client.post("/v1/removals", headers=mine, data=data, files=parts), 422, words)
    assert store.total() == 0
    assert not blobs.ids()


def test_a_picture_bomb(client: TestClient, mine: Headers) -> None:
    """30,000 x 30,000 black pixels in a megabyte: refused by its header, before anything is decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    side = 30_000
    header = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    pixels = zlib.compress(bytes(side * 3_000), 9)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    response = client.post(
        "/v1/removals", headers=mine, data={"model": "flags"}, files=[("images", ("b.png", io.BytesIO(bomb)))]
    )
    assert is_problem(response, 422, "pixels")


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("application/json", b'{"images": ["/etc/passwd"]}', 415),
        ("multipart/form-data", b"x", 400),
        ("multipart/form-data; boundary=x", b"garbage", 400),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\nno name\r\n--x--\r\n", 400),
        ("multipart/form-data; boundary=x; charset=unicode_escape", b"--x--\r\n", 415),
        ("", b"", 415),
    ],
)
def test_bodies_that_are_no_form(client: TestClient, mine: Headers, kind: str, body: bytes, status: int) -> None:
    assert is_problem(client.post("/v1/removals", headers={**mine, "Content-Type": kind}, content=body), status)


def test_unknown_routes_and_methods(client: TestClient) -> None:
    assert is_problem(client.get("/nothing"), 404)
    assert is_problem(client.get("/docs"), 404)
    assert is_problem(client.get("/openapi.json"), 404)
    response = client.delete("/healthz")
    assert is_problem(response, 405)
    assert response.headers["allow"] == "GET"


def test_what_nobody_foresaw_says_nothing(
    client: TestClient, mine: Headers, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Zoe at /srv/secret")

    monkeypatch.setattr(RequestStore, "get", fail)
    response = client.get("/v1/removals/req-1", headers=mine)
    assert is_problem(response, 500)
    assert "Zoe" not in response.text + capfd.readouterr().err


def test_a_platform_that_fails_is_not_described(client: TestClient, mine: Headers, store: RequestStore) -> None:
    id = submit(client, mine)
    with store.database.write() as connection:
        connection.exec_driver_sql("UPDATE requests SET body = 'x'")
    response = client.get(f"/v1/removals/{id}", headers=mine)
    assert is_problem(response, 503, "just now")
    assert int(response.headers["retry-after"]) > 0


def test_pages_hold_everything_once(client: TestClient, mine: Headers) -> None:
    ids = [submit(client, mine, str(number)) for number in range(5)]
    seen, cursor = [], None
    while True:
        page = client.get("/v1/removals", headers=mine, params={"limit": 2, **({"cursor": cursor} if cursor else {})})
        seen += [item["id"] for item in page.json()["items"]]
        cursor = page.json()["next"]
        if cursor is None:
            break
    assert seen == ids


def test_filters(client: TestClient, mine: Headers) -> None:
    soon, later = date.today() + timedelta(days=3), date.today() + timedelta(days=9)
    submit(client, mine, "later", due=str(later))
    first = submit(client, mine, "soon", due=str(soon))
    other = submit(client, mine, "face", model="faces")
    client.post(f"/v1/removals/{other}/withdraw", headers=mine)

    def listed(**params: str) -> list[str]:
        return [item["id"] for item in client.get("/v1/removals", headers=mine, params=params).json()["items"]]

    assert listed(due_by=str(soon)) == [first]
    assert listed(by_due="true")[0] == first
    assert listed(state="withdrawn") == [other] == listed(model="faces")


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=1000", "limit=x", "state=lost", "due_by=soon", "cursor=req-none", "cursor=../x"]
)
def test_bad_queries(client: TestClient, mine: Headers, query: str) -> None:
    assert is_problem(client.get(f"/v1/removals?{query}", headers=mine), 422, query.partition("=")[0])


def test_show_and_withdraw(client: TestClient, mine: Headers, store: RequestStore, blobs: BlobStore) -> None:
    id = submit(client, mine, prompt="a flag")
    shown = client.get(f"/v1/removals/{id}", headers=mine).json()
    assert (shown["prompt"], shown["images"], shown["days_left"]) == ("a flag", 1, 28)
    assert [event["reason"] for event in shown["history"]] == ["submitted"]
    for _ in range(2):
        assert client.post(f"/v1/removals/{id}/withdraw", headers=mine).json() == {"id": id, "state": "withdrawn"}
    assert not blobs.ids()
    assert store.get(id).history[-1].actor.startswith("acme/token-")


def test_a_request_in_a_batch_cannot_be_withdrawn(client: TestClient, mine: Headers, store: RequestStore) -> None:
    id = submit(client, mine)
    store.drain("night-1")
    assert is_problem(client.post(f"/v1/removals/{id}/withdraw", headers=mine), 409, "batched")
    assert store.get(id).state is RequestState.BATCHED


def test_evidence_is_shown_without_the_operators_set_up(client: TestClient, mine: Headers, store: RequestStore) -> None:
    id = submit(client, mine)
    store.drain("night-1")
    evidence = {"verdict": "passed", "why": "it is gone", "basis": {"calibration": "/srv/secret"}}
    store.transition(id, RequestState.REMOVED, detail="/srv/secret", evidence=evidence)
    shown = client.get(f"/v1/removals/{id}", headers=mine)
    assert shown.json()["evidence"] == {"verdict": "passed", "why": "it is gone"}
    assert "/srv" not in shown.text


def test_a_batch_names_only_what_was_sent_with_it(client: TestClient, mine: Headers, store: RequestStore) -> None:
    lines = [
        {"model": "flags", "images": ["a.png"], "external_id": "1"},
        {"model": "flags", "images": ["/etc/passwd"]},
        {"model": "flags", "images": ["../a.png"]},
        {"model": "flags", "images": ["http://127.0.0.1/a.png"]},
        {"model": "flags", "images": ["file:///etc/passwd"]},
        {"model": "flags", "images": ["b.png"]},
    ]
    text = "\n".join(map(json.dumps, lines)) + "\n{broken\n"
    parts = [("requests", ("r.jsonl", text.encode())), *files("a", "files"), *files("b", "files")]
    response = client.post("/v1/removals/batch", headers=mine, files=parts)
    told = response.json()
    assert (response.status_code, told["accepted"], told["refused"]) == (200, 2, 5)
    assert [line["id"] is not None for line in told["lines"]] == [True, False, False, False, False, True, False]
    assert "/etc" not in response.text
    assert {record.tenant for record in store.list()} == {"acme"}
    again = client.post("/v1/removals/batch", headers=mine, files=parts).json()
    assert (again["accepted"], again["known"]) == (0, 2)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (files("a", "files"), "requests"),
        ([("requests", ("r", b"{}\n")), *files("a", "images")], "requests"),
        ([("requests", ("r", b"{}\n")), *files("a", "files"), *files("a", "files")], "same name"),
        ([("requests", ("r", b"\xff\xfe{\0"))], "UTF-8"),
        ([("requests", ("r", b"[\n{}\n]"))], "lines"),
    ],
)
def test_bad_batches(client: TestClient, mine: Headers, parts: list[tuple[str, tuple[str, bytes]]], words: str) -> None:
    assert is_problem(client.post("/v1/removals/batch", headers=mine, files=parts), 422, words)


def test_a_tenant_sees_its_part_of_a_batch(client: TestClient, token: Token, store: RequestStore) -> None:
    one, other, third = token("acme"), token("other"), token("third")
    mine, _ = submit(client, one), submit(client, other, "b")
    assert store.drain("night-1").requests
    shown = client.get("/v1/batches/night-1", headers=one).json()
    assert shown["requests"] == [mine]
    assert shown["verdicts"] is None
    assert is_problem(client.get("/v1/batches/night-1", headers=third), 404)
    assert is_problem(client.get("/v1/batches/..%2f..%2fetc", headers=one), 404)


def test_probes_and_metrics(client: TestClient, token: Token, settings: object) -> None:
    assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
    id = submit(client, token())
    client.get(f"/v1/removals/{id}", headers=token())
    text = client.get("/metrics", headers=token("ops", "admin")).text
    assert 'expunge_requests{model="flags",state="accepted"} 1.0' in text
    assert 'expunge_http_requests_total{method="POST",route="/v1/removals",status="201"} 1.0' in text
    assert id not in text
    assert "acme" not in text


def test_not_ready_without_its_database(client: TestClient, store: RequestStore) -> None:
    with store.database.write() as connection:
        connection.exec_driver_sql("UPDATE identity SET value = 'another' WHERE name = 'key'")
    assert is_problem(client.get("/readyz"), 503)
    assert client.get("/healthz").status_code == 200


def test_pictures_stay_in_memory(client: TestClient, mine: Headers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starlette would write what is over a megabyte to a temporary file."""
    import tempfile

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a temporary file")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    big = picture("big", (900, 600))
    assert len(big) > 1_500_000
    response = client.post("/v1/removals", headers=mine, data={"model": "flags"}, files=[("images", ("b.png", big))])
    assert response.status_code == 201
