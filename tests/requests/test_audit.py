"""The audit log against somebody who has the database and not the key."""

import json
import shutil

import pytest

from expunge.errors import StorageError
from expunge.requests import changes
from expunge.requests.audit import ANCHOR
from expunge.requests.store import RequestStore, open_store
from expunge.settings import Settings
from expunge.types import RequestState
from tests.requests.conftest import Ask
from tests.requests.test_sealed_texts import insider


@pytest.fixture
def store(settings: Settings, ask: Ask) -> RequestStore:
    """Six events: three submitted, two drained, one withdrawn."""
    opened = open_store(settings.model_copy(update={"actor": "ana"}))
    for name in "abc":
        opened.add(ask(name))
    opened.transition("req-c", RequestState.WITHDRAWN, reason="withdrawn", detail="she asked")
    opened.drain("night-1")
    return opened


def test_a_log_that_nobody_touched(store: RequestStore) -> None:
    found = store.verify_audit()
    assert (found.events, found.problem, found.backwards, found.anchored) == (6, None, (), 6)


def test_an_event_says_who_did_what_and_why(store: RequestStore) -> None:
    event = store.get("req-c").history[-1]
    assert (event.actor, event.reason, event.previous, event.state) == ("ana", "withdrawn", "accepted", "withdrawn")
    assert event.detail == "she asked"
    assert event.release


@pytest.mark.parametrize(
    ("statement", "where"),
    [
        ("UPDATE events SET actor = 'bob' WHERE id = 4", "event 4"),
        ("UPDATE events SET at = '2020-01-01 00:00:00.000000' WHERE id = 1", "event 1"),
        ("UPDATE events SET request = 'req-a' WHERE id = 3", "event 3"),
        ("UPDATE events SET detail = '' WHERE id = 4", "event 4"),
        ("DELETE FROM events WHERE id = 2", "event 3"),
        ("DELETE FROM events WHERE id > 4", "cut off"),
        ("DELETE FROM events WHERE id > 4; UPDATE audit_head SET seq = 4", "head of the log was altered"),
        ("DELETE FROM events; UPDATE audit_head SET seq = 0, link = ''", "head of the log was altered"),
        ("DELETE FROM audit_head", "head of the log was altered"),
        ("UPDATE requests SET state = 'removed' WHERE id = 'req-a'", "request req-a"),
    ],
)
def test_what_an_insider_changes_is_named(store: RequestStore, settings: Settings, statement: str, where: str) -> None:
    with insider(settings) as database:
        for one in statement.split(";"):
            database.execute(one)
    problem = store.verify_audit().problem
    assert problem is not None
    assert where in problem


def test_an_old_database_put_back_as_a_whole_is_noticed(store: RequestStore, settings: Settings, ask: Ask) -> None:
    with insider(settings) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copy(settings.home / "expunge.db", settings.home / "old.db")
    store.transition("req-a", RequestState.FAILED)
    for name in ("expunge.db-wal", "expunge.db-shm"):
        (settings.home / name).unlink(missing_ok=True)
    shutil.copy(settings.home / "old.db", settings.home / "expunge.db")
    problem = store.verify_audit().problem
    assert problem is not None
    assert "names event 7" in problem
    for name in "de":  # and stays so when the log has grown past it
        store.add(ask(name))
    problem = store.verify_audit().problem
    assert problem is not None
    assert "event 7 is not the one" in problem


def test_nobody_continues_a_log_whose_head_was_changed(store: RequestStore, settings: Settings, ask: Ask) -> None:
    with insider(settings) as database:
        database.execute("UPDATE audit_head SET seq = 4")
    with pytest.raises(StorageError, match="the audit log was altered"):
        store.add(ask("d"))
    assert store.find("flags", "ticket-d") is None


def test_a_forged_anchor_is_named(store: RequestStore, settings: Settings) -> None:
    path = settings.home / ANCHOR
    content = json.loads(path.read_text())
    content["head"]["seq"] = 3
    path.write_text(json.dumps(content))
    problem = store.verify_audit().problem
    assert problem is not None
    assert ANCHOR in problem


def test_a_clock_that_is_set_back_is_said_and_is_no_tampering(
    store: RequestStore, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datetime import UTC, datetime

    monkeypatch.setattr(changes, "now", lambda: datetime(2020, 1, 1, tzinfo=UTC))
    store.add(ask("d"))
    found = store.verify_audit()
    assert (found.problem, found.backwards) == (None, (7,))
