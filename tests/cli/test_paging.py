"""list on a store that has grown: it reads what it shows, and goes on where it stopped."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, insert

from expunge.requests import queries
from expunge.requests.records import RequestEvent
from expunge.requests.store import RequestStore, open_store
from expunge.requests.tables import events, requests
from expunge.settings import load_settings
from expunge.types import RemovalRequest, RequestState

Command = Callable[..., Any]

COUNT = 20_000


def name(number: int) -> str:
    return f"req-{number:06d}"


def fill(count: int) -> RequestStore:
    """Ten requests arrive at the same moment; each third is of another model; each has two lines of history."""
    store = open_store(load_settings())
    start = datetime(2026, 1, 1, tzinfo=UTC)
    rows, lines = [], []
    for number in range(count):
        model = "flags" if number % 3 else "faces"
        request = RemovalRequest(id=name(number), model=model, images=("0" * 64,), external_id=f"ticket-{number}")
        envelope = store.vault.new(request.id)
        at = start + timedelta(seconds=number // 10)
        about = {
            "id": request.id,
            "model": model,
            "external_id": store.vault.external_id(model, request.external_id),
            "data_key": envelope.wrapped,
            "body": envelope.close("body", request.model_dump_json()),
        }
        state = RequestState.FAILED if number % 100 == 0 else RequestState.ACCEPTED
        counts = {"attempts": 0, "priority": 0, "accepted_at": at}
        rows.append({**about, **counts, "state": state})
        line = {"request": request.id, "at": at, "state": RequestState.ACCEPTED, "detail": ""}
        lines += [line, {**line, "detail": "again"}]
    engine = create_engine(load_settings().database)
    with engine.begin() as connection:
        connection.execute(insert(requests), rows)
        connection.execute(insert(events), lines)
    engine.dispose()
    return store


@pytest.fixture
def store() -> Iterator[RequestStore]:
    opened = fill(COUNT)
    yield opened
    opened.close()


@contextmanager
def statements() -> Iterator[list[str]]:
    """Every statement that reads, as it is sent."""
    sent: list[str] = []

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        if statement.lstrip().upper().startswith("SELECT"):
            sent.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    yield sent
    event.remove(Engine, "before_cursor_execute", note)


def ids(out: str) -> list[str]:
    return re.findall(r"^ ?(req-\d+)", out, re.MULTILINE)


def test_a_page_is_what_is_shown(command: Command, store: RequestStore, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    read = RemovalRequest.model_validate_json

    def counted(body: str) -> RemovalRequest:
        made.append(body)
        return read(body)

    monkeypatch.setattr(RemovalRequest, "model_validate_json", counted)
    with statements() as sent:
        ended = command("list")
    assert ids(ended.out) == [name(number) for number in range(100)]
    assert ended.err == "showing 100 of 20,000; for more, add --after req-000099 or a larger --limit\n"
    assert len(made) <= 101
    assert not [statement for statement in sent if "FROM events" in statement]
    assert len(sent) < 10


def test_pages_follow_each_other_to_the_end(command: Command, store: RequestStore) -> None:
    seen, after = [], []
    while True:
        ended = command("list", "--model", "faces", "--state", "failed", "--limit", 30, *after)
        found = ids(ended.out)
        if not found:
            break
        seen += found
        after = ["--after", found[-1]]
    assert seen == [name(number) for number in range(0, COUNT, 300)]
    assert (ended.code, ended.out) == (0, "no more requests\n")
    last = command("list", "--after", name(COUNT - 6))
    assert ids(last.out) == [name(number) for number in range(COUNT - 5, COUNT)]
    assert last.err == ""


def test_a_long_table_has_one_head(command: Command, store: RequestStore) -> None:
    ended = command("list", "--limit", 2500)
    assert ids(ended.out) == [name(number) for number in range(2500)]
    assert ended.out.count("external id") == 1
    assert len(ended.out.splitlines()) == 2501


def test_json_is_all_of_them_a_few_hundred_at_a_time(
    command: Command, store: RequestStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    most: list[int] = []
    read = queries.records

    def noted(*arguments: Any, **more: Any) -> list[Any]:
        found = read(*arguments, **more)
        most.append(len(found))
        return found

    monkeypatch.setattr(queries, "records", noted)
    found = command("list", "--json", "--after", name(COUNT - 2001)).json
    assert [each["request"]["id"] for each in found] == [name(number) for number in range(COUNT - 2000, COUNT)]
    assert max(most) <= queries.IDS_PER_STATEMENT
    assert {len(each["history"]) for each in found} == {2}
    assert len(command("list", "--json", "--limit", 3).json) == 3


def test_each_gives_what_list_gives(store: RequestStore) -> None:
    wanted: dict[str, Any] = {"model": "flags", "state": RequestState.FAILED, "after": name(500)}
    listed = store.list(**wanted)
    assert list(store.each(**wanted)) == listed
    assert store.total("flags", RequestState.FAILED) == len(store.list("flags", RequestState.FAILED))
    assert all(isinstance(line, RequestEvent) for record in listed for line in record.history)
    assert [record.model_copy(update={"history": ()}) for record in listed] == store.list(**wanted, history=False)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_after_what_does_not_exist(command: Command, flags: list[str]) -> None:
    ended = command("list", "--after", "req-none", *flags)
    assert ended.code == 4
    assert "request 'req-none' does not exist" in ended.out + ended.err


def test_nothing_to_list(command: Command) -> None:
    assert command("list").out == "no requests\n"
    assert command("list", "--json").json == []


def test_the_queue_is_counted_by_the_database(store: RequestStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from expunge.batch import metrics

    said: dict[tuple[str, str], float] = {}
    monkeypatch.setattr(metrics, "put", lambda name, value, model: said.update({(name, model): value}))
    with statements() as sent:
        metrics.report_queue(store, load_settings(), datetime(2026, 1, 1, 1, tzinfo=UTC))
    assert len(sent) == 1
    assert "body" not in sent[0]
    assert said["expunge_queue_depth", "flags"] == sum(n % 3 > 0 and n % 100 > 0 for n in range(COUNT))
    assert said["expunge_queue_oldest_seconds", "faces"] == 3600


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_limit_that_no_database_counts_to_is_refused(command: Command, more: list[str]) -> None:
    ended = command("list", "--limit", "9" * 20, *more)
    assert ended.code == 2
    assert "--limit" in ended.err
