"""Prompts, reasons and external ids in the database: sealed, bound to their place, found by a keyed hash."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from expunge.errors import InputError, StorageError
from expunge.requests.store import RequestStore, open_store
from expunge.settings import Settings
from expunge.types import RemovalRequest, RequestState
from tests.requests.conftest import Ask, made_by_an_earlier_release

MARKERS = ("PROMPT-4711", "REASON-4711", "TICKET-4711", "DETAIL-4711", "EVIDENCE-4711", "OPTION-4711")


@pytest.fixture
def marked(ask: Ask) -> RemovalRequest:
    prompt, reason, ticket, *_, option = MARKERS
    edit = {"editor": "blend", "options": {"x": option}}
    return ask("a", prompt=prompt, reason=reason, external_id=ticket, edit=edit)


def in_the_clear(folder: Path) -> set[tuple[str, str]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {(marker, path.name) for path in files for marker in MARKERS if marker.encode() in path.read_bytes()}


@contextmanager
def insider(settings: Settings, *gone: str) -> Iterator[sqlite3.Connection]:
    """Somebody with the database alone, who takes its triggers away first."""
    with closing(sqlite3.connect(settings.home / "expunge.db")) as connection, connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        yield connection


def test_no_text_is_on_disk_in_the_clear(settings: Settings, marked: RemovalRequest) -> None:
    store = open_store(settings)
    store.add(marked)
    store.drain("night-1")
    store.transition("req-a", RequestState.FAILED, detail=MARKERS[3], evidence={"why": MARKERS[4]})
    assert in_the_clear(settings.home) == set()
    record = open_store(settings).get("req-a")
    assert record.request == marked
    assert record.evidence == {"why": MARKERS[4]}
    assert record.history[-1].detail == MARKERS[3]
    assert store.find("flags", MARKERS[2]) == record


@pytest.mark.parametrize("revision", ["0001", "0002", "0003"])
def test_a_database_of_an_earlier_release_is_sealed_when_it_is_opened(
    settings: Settings, marked: RemovalRequest, revision: str
) -> None:
    made_by_an_earlier_release(settings, revision, marked)
    assert in_the_clear(settings.home)
    store = open_store(settings)
    assert in_the_clear(settings.home) == set(), "nor in freed pages, nor in the log"
    record = store.get("req-a")
    assert record.request == marked
    assert [event.detail for event in record.history] == ["", MARKERS[2]]
    assert store.add(marked.model_copy(update={"id": "req-b"})) == (record, False)
    store.transition("req-a", RequestState.REMOVED)
    assert store.verify_audit().problem is None


def test_two_rows_that_are_swapped_do_not_open(settings: Settings, ask: Ask) -> None:
    store = open_store(settings)
    for name in "ab":
        store.add(ask(name))
    with insider(settings) as database:
        (mine,) = database.execute("SELECT body FROM requests WHERE id = 'req-b'").fetchone()
        database.execute("UPDATE requests SET body = ? WHERE id = 'req-a'", [mine])
    with pytest.raises(StorageError, match="request req-a does not open"):
        store.get("req-a")
    with insider(settings) as database:
        (key,) = database.execute("SELECT data_key FROM requests WHERE id = 'req-b'").fetchone()
        database.execute("UPDATE requests SET data_key = ? WHERE id = 'req-a'", [key])
    with pytest.raises(StorageError, match="request req-a does not open"):
        store.get("req-a")


def test_the_external_id_of_one_model_does_not_show_in_another(settings: Settings, ask: Ask) -> None:
    store = open_store(settings)
    store.add(ask("a", model="flags", external_id="t"))
    store.add(ask("b", model="faces", external_id="t"))
    with insider(settings) as database:
        assert len(set(database.execute("SELECT external_id FROM requests").fetchall())) == 2


def test_a_purged_request_leaves_digests_and_cannot_be_read_again(settings: Settings, marked: RemovalRequest) -> None:
    store = open_store(settings)
    store.add(marked)
    store.transition("req-a", RequestState.WITHDRAWN, detail=MARKERS[3])
    with insider(settings) as database:
        columns = ("body", "data_key")
        body, _ = database.execute(f"SELECT {', '.join(columns)} FROM requests").fetchone()
    record = store.purge("req-a", "one picture and the texts were destroyed")
    assert record.state is RequestState.PURGED
    assert [event.detail for event in record.history] == ["", "", "one picture and the texts were destroyed"]
    assert not set(marked.images) & set(record.request.images)
    assert record.request.prompt is None
    with insider(settings) as database:  # an old backup of the text, without the key
        database.execute("UPDATE requests SET body = ?", [body])
    with pytest.raises(StorageError, match="does not open"):
        store.get("req-a")
    assert store.verify_audit().problem is None
    store.add(marked.model_copy(update={"external_id": "other", "id": "req-b"}))


def test_the_external_id_of_a_purged_request_is_not_used_again(settings: Settings, ask: Ask) -> None:
    store = open_store(settings)
    store.add(ask("a"))
    store.transition("req-a", RequestState.WITHDRAWN)
    store.purge("req-a", "")
    with pytest.raises(InputError, match="external_id: req-a had it, and was purged"):
        store.add(ask("b", external_id="ticket-a"))


def test_the_database_itself_refuses_what_the_lifecycle_does_not_allow(
    store: RequestStore, ask: Callable[..., RemovalRequest]
) -> None:
    from itertools import product

    from sqlalchemy import text
    from sqlalchemy.exc import DBAPIError

    from expunge.requests.lifecycle import ALLOWED

    store.add(ask("a"))
    allowed: dict[RequestState, set[RequestState]] = {state: set() for state in RequestState}
    for here, to in product(RequestState, RequestState):
        with store.database._engine.connect() as connection:
            transaction = connection.begin()
            connection.execute(text("PRAGMA defer_foreign_keys = ON"))
            (trigger,) = connection.execute(
                text("SELECT sql FROM sqlite_master WHERE name = 'requests_lifecycle'")
            ).one()
            connection.execute(text("DROP TRIGGER requests_lifecycle"))
            connection.execute(text("UPDATE requests SET state = :here"), {"here": here.value})
            connection.exec_driver_sql(trigger)
            try:
                connection.execute(text("UPDATE requests SET state = :to"), {"to": to.value})
                allowed[here] |= {to} - {here}
            except DBAPIError as error:
                assert "cannot go" in str(error)  # noqa: PT017
            transaction.rollback()
    assert {here: frozenset(after) for here, after in allowed.items()} == ALLOWED


@pytest.mark.parametrize("statement", ["DELETE FROM events", "UPDATE events SET detail = ''", "DELETE FROM requests"])
def test_rows_that_are_only_added_to_stay(settings: Settings, ask: Ask, statement: str) -> None:
    open_store(settings).add(ask("a"))
    with (
        closing(sqlite3.connect(settings.home / "expunge.db")) as database,
        pytest.raises(sqlite3.IntegrityError, match=r"only added to|never deleted"),
    ):
        database.execute(statement)
