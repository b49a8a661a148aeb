"""`expunge purge`, `withdraw` and `audit` as an operator and an auditor use them."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from expunge.requests.blobs import open_blobs
from expunge.requests.store import open_store
from expunge.settings import load_settings
from expunge.types import RequestState
from tests.cli.conftest import Command


@pytest.fixture
def name(command: Command, picture: Path) -> str:
    given = ("--prompt", "PROMPT-4711", "--reason", "REASON-4711", "--external-id", "TICKET-4711")
    return command("--actor", "ana", "submit", picture, "--model", "flags", *given, "--json").json["id"]


def test_withdrawing_deletes_the_pictures_at_once(command: Command, name: str) -> None:
    assert open_blobs(load_settings()).ids()
    assert command("withdraw", name).out == f"withdrawn {name}\n"
    assert open_blobs(load_settings()).ids() == []


def test_a_picture_that_another_request_needs_stays(command: Command, name: str, picture: Path) -> None:
    other = command("submit", picture, "--model", "flags", "--external-id", "other", "--json").json["id"]
    command("withdraw", name)
    [blob] = open_store(load_settings()).get(other).request.images
    assert open_blobs(load_settings()).ids() == [blob]


def test_the_audit_log_tells_a_request_s_whole_life(command: Command, name: str) -> None:
    command("--actor", "bob", "withdraw", name)
    assert command("purge", name, "--yes").code == 0
    events = command("audit", "show", name, "--json").json["events"]
    told = [(event["actor"], event["reason"], event["previous"], event["state"]) for event in events]
    assert told[:2] == [("ana", "submitted", None, "accepted"), ("bob", "withdrawn", "accepted", "withdrawn")]
    assert told[2][1:] == ("purged", "withdrawn", "purged")
    table = command("audit", "show", name).out
    assert all(word in table for word in ("ana", "bob", "purged", "destroyed"))
    assert "unbroken" in command("audit", "verify").out


def test_verify_names_the_first_bad_row_and_fails(command: Command, name: str) -> None:
    command("withdraw", name)
    with closing(sqlite3.connect(load_settings().home / "expunge.db")) as database, database:
        database.execute("DROP TRIGGER events_unchanged")
        database.execute("UPDATE events SET actor = 'nobody' WHERE id = 2")
    ended = command("audit", "verify")
    assert ended.code == 6
    assert f"event 2 (request {name})" in ended.err
    assert "event 2" in command("audit", "verify", "--json").json["error"]


def test_purge_asks_first_and_leaves_nothing_to_read(command: Command, name: str) -> None:
    assert command("purge", name, "--yes").code != 0, "it still waits for a night"
    command("withdraw", name)
    assert command("purge", name).code == 2
    assert "would purge" in command("purge", name, "--dry-run").out
    assert command("show", name).out.count("PROMPT-4711") == 1
    assert f"purged {name}" in command("purge", name, "--yes").out
    shown = command("show", name).out
    assert "purged" in shown
    assert "4711" not in shown
    assert command("purge", name, "--yes").code != 0, "nothing is purged twice"


def test_retention_decides_what_is_due(command: Command, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command("withdraw", name)
    assert command("purge", "--yes", "--json").json["certificates"] == [], "without a setting all is kept"
    monkeypatch.setenv("EXPUNGE_RETENTION__WITHDRAWN", "30")
    assert command("purge", "--yes", "--json").json["certificates"] == []
    monkeypatch.setenv("EXPUNGE_RETENTION__WITHDRAWN", "0")
    [certificate] = command("purge", "--yes", "--json").json["certificates"]
    assert certificate["request"] == name
    assert open_store(load_settings()).get(name).state is RequestState.PURGED
