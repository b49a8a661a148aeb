"""Tokens, scopes and tenants: who gets in, and what is nobody else's."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from expunge.cli import run
from expunge.errors import InputError, NotFoundError
from expunge.requests.blobs import BlobStore
from expunge.requests.store import RequestStore
from expunge.service import tokens
from expunge.service.app import create_service
from expunge.service.limits import RateLimit
from expunge.settings import load_settings
from tests.service.conftest import Headers, files, is_problem, picture
from tests.service.test_removals import submit

Token = Callable[..., Headers]


def bearer(text: str) -> Headers:
    return {"Authorization": f"Bearer {text}"}


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer x", "Basic x", f"Bearer expunge_{'0' * 12}_{'a' * 43}"])
def test_without_a_token_nobody_gets_in(client: TestClient, header: str) -> None:
    response = client.post("/v1/removals", headers={"Authorization": header}, files=files())
    assert is_problem(response, 401, "token")
    assert response.headers["www-authenticate"] == "Bearer"


def test_the_secret_of_a_token_is_not_kept(store: RequestStore) -> None:
    text = tokens.create(store, "acme", ["submit"], None)
    _, id, secret = text.split("_", 2)
    with store.read() as connection:
        rows = str(connection.exec_driver_sql("SELECT * FROM tokens").all())
    assert id in rows
    assert secret not in rows


def test_revoked_and_expired(client: TestClient, store: RequestStore) -> None:
    text = tokens.create(store, "acme", ["submit"], datetime.now(UTC) + timedelta(hours=1))
    assert client.get("/v1/removals", headers=bearer(text)).status_code == 200
    tokens.revoke(store, text.split("_")[1])
    assert is_problem(client.get("/v1/removals", headers=bearer(text)), 401)
    late = tokens.create(store, "acme", ["submit"], datetime.now(UTC) + timedelta(hours=1))
    with store.database.write() as connection:
        connection.exec_driver_sql("UPDATE tokens SET expires = '2001-01-01 00:00:00'")
    assert is_problem(client.get("/v1/removals", headers=bearer(late)), 401)


@pytest.mark.parametrize(
    "change",
    ["tenant = 'other'", "scopes = 'admin'", "expires = '2999-01-01 00:00:00'", "revoked = NULL, mac = ''"],
)
def test_a_token_whose_row_was_altered_is_none(client: TestClient, store: RequestStore, change: str) -> None:
    text = tokens.create(store, "acme", ["submit"], datetime.now(UTC) + timedelta(hours=1))
    with store.database.write() as connection:
        connection.exec_driver_sql(f"UPDATE tokens SET {change}")
    assert is_problem(client.get("/v1/removals", headers=bearer(text)), 401)


def test_scopes(client: TestClient, token: Token) -> None:
    submits, reviews, runs = token("acme", "submit"), token("acme", "review"), token("acme", "admin")
    id = submit(client, submits)
    assert is_problem(client.post("/v1/removals", headers=reviews, files=files()), 403, "submit")
    assert is_problem(client.post("/v1/removals/batch", headers=reviews, files=files()), 403, "submit")
    assert is_problem(client.post(f"/v1/removals/{id}/withdraw", headers=reviews), 403, "submit")
    assert is_problem(client.get("/v1/batches/night-1", headers=submits), 403, "review")
    for headers in (submits, reviews, runs):
        assert client.get(f"/v1/removals/{id}", headers=headers).status_code == 200
    for headers in (submits, reviews):
        assert is_problem(client.get("/metrics", headers=headers), 403, "admin")
    assert client.post(f"/v1/removals/{id}/withdraw", headers=runs).status_code == 200


def test_tenants_do_not_see_each_other(client: TestClient, token: Token, store: RequestStore) -> None:
    one, other = token("acme", "admin"), token("other", "admin")
    mine, theirs = submit(client, one), submit(client, other)
    assert mine != theirs
    assert [item["id"] for item in client.get("/v1/removals", headers=other).json()["items"]] == [theirs]
    absent = client.get("/v1/removals/req-000000000000", headers=other)
    for response in (
        client.get(f"/v1/removals/{mine}", headers=other),
        client.post(f"/v1/removals/{mine}/withdraw", headers=other),
    ):
        assert is_problem(response, 404)
        assert response.json() == absent.json()
    cursors = [client.get(f"/v1/removals?cursor={id}", headers=other).json() for id in (mine, "req-000000000000")]
    assert cursors[0] == cursors[1]
    assert store.get(mine).state == "accepted"


def test_the_same_external_id_is_another_request_for_another_tenant(
    client: TestClient, token: Token, store: RequestStore
) -> None:
    ids = {submit(client, token(tenant), prompt=tenant) for tenant in ("acme", "other", "default")}
    assert len(ids) == 3
    data = {"model": "flags", "external_id": "ticket-a", "prompt": "acme"}
    again = client.post("/v1/removals", headers=token("other"), data=data, files=files())
    assert is_problem(again, 422, "external_id")
    with store.read() as connection:
        hashes = {*connection.exec_driver_sql("SELECT external_id FROM requests").scalars()}
    assert len(hashes) == 3


def test_what_comes_over_the_command_line_is_the_default_tenants(
    client: TestClient, token: Token, store: RequestStore, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture("a"))
    assert run(["submit", str(path), "--model", "flags", "--external-id", "t"]) == 0
    [record] = store.list()
    assert client.get(f"/v1/removals/{record.request.id}", headers=token("default")).status_code == 200
    assert is_problem(client.get(f"/v1/removals/{record.request.id}", headers=token("acme")), 404)


def test_the_commands(capfd: pytest.CaptureFixture[str], store: RequestStore) -> None:
    assert run(["tokens", "create", "--tenant", "acme", "--scope", "submit", "--expires", "2999-01-01"]) == 0
    text = capfd.readouterr().out.strip()
    caller = tokens.verify(store, text)
    assert caller is not None
    assert (caller.tenant, caller.scopes) == ("acme", {"submit"})
    assert run(["tokens", "list"]) == 0
    listed = capfd.readouterr().out
    assert caller.token in listed
    assert text not in listed
    assert run(["tokens", "revoke", caller.token]) == 0
    assert tokens.verify(store, text) is None
    assert run(["tokens", "revoke", "nobody"]) == NotFoundError.exit_code
    assert run(["tokens", "create", "--tenant", "a b", "--scope", "submit"]) == InputError.exit_code
    assert run(["tokens", "create", "--tenant", "a", "--scope", "root"]) == InputError.exit_code
    assert run(["tokens", "create", "--tenant", "a", "--scope", "submit", "--expires", "2001-01-01"]) == 2


def test_other_machines_are_let_in_only_with_tokens(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--host", "0.0.0.0", "--port", "0"]) == InputError.exit_code
    assert "expunge tokens create" in capfd.readouterr().err


def test_rate_limit_of_a_token(
    token: Token, store: RequestStore, blobs: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPUNGE_SERVICE__RATE", "0.001")
    monkeypatch.setenv("EXPUNGE_SERVICE__BURST", "3")
    client = TestClient(create_service(load_settings(), store, blobs))
    mine, other = token(), token()
    *allowed, limited = [client.get("/v1/removals", headers=mine) for _ in range(4)]
    assert [answer.status_code for answer in allowed] == [200] * 3
    assert is_problem(limited, 429, "too often")
    assert int(limited.headers["retry-after"]) > 900
    assert client.get("/v1/removals", headers=other).status_code == 200


def test_a_bucket_fills_again() -> None:
    now = 0.0
    limit = RateLimit(2.0, 3, clock=lambda: now)
    assert [limit.wait("a") for _ in range(4)] == [0, 0, 0, 1]
    now = 0.5
    assert [limit.wait("a"), limit.wait("a")] == [0, 1]
    now = 1000.0
    assert [limit.wait("a") for _ in range(4)] == [0, 0, 0, 1]
