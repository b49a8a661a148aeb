"""The durable queue: accepted once, drained once, moved only along its lifecycle, and all of it on record."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from itertools import product
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from expunge.errors import ExpungeError, InputError, NotFoundError, StorageError, TransitionError, UnavailableError
from expunge.requests import changes, database
from expunge.requests.audit import Trail
from expunge.requests.blobs import sealing_key
from expunge.requests.database import Database
from expunge.requests.lifecycle import ALLOWED
from expunge.requests.store import RequestStore, open_store
from expunge.requests.tables import metadata
from expunge.requests.vault import Vault
from expunge.settings import Settings
from expunge.types import RemovalRequest, RequestState

Ask = Callable[..., RemovalRequest]
S = RequestState

# The shortest way to each state.
WAY: dict[RequestState, tuple[RequestState, ...]] = {
    S.ACCEPTED: (),
    S.BATCHED: (S.BATCHED,),
    S.REMOVED: (S.BATCHED, S.REMOVED),
    S.FAILED: (S.BATCHED, S.FAILED),
    S.NOT_REPRODUCED: (S.BATCHED, S.NOT_REPRODUCED),
    S.WITHDRAWN: (S.WITHDRAWN,),
}


def bring(store: RequestStore, request: RemovalRequest, state: RequestState) -> None:
    store.add(request)
    for step in WAY[state]:
        store.transition(request.id, step)


def test_add_and_get(store: RequestStore, ask: Ask) -> None:
    request = ask(
        "a", prompt="a flag", due=date(2027, 1, 1), priority=3, edit={"editor": "blend", "options": {"k": "v"}}
    )
    record, new = store.add(request)
    assert new
    assert record == store.get("req-a") == store.find("flags", "ticket-a")
    assert record.request == request
    assert (record.state, record.batch, record.attempts, record.evidence) == (S.ACCEPTED, None, 0, None)
    assert record.accepted_at.utcoffset() is not None
    assert [(event.previous, event.state) for event in record.history] == [(None, S.ACCEPTED)]


def test_same_external_id_is_accepted_once_a_model(store: RequestStore, ask: Ask) -> None:
    store.add(ask("a"))
    record, new = store.add(ask("b", external_id="ticket-a"))
    assert (record.request.id, new) == ("req-a", False)
    assert store.add(ask("c", external_id="ticket-a", model="faces"))[1]


def test_same_external_id_with_other_content(store: RequestStore, ask: Ask) -> None:
    store.add(ask("a"))
    with pytest.raises(InputError, match=r"^external_id: req-a .* prompt, priority"):
        store.add(ask("b", external_id="ticket-a", prompt="other", priority=1))


def test_taken_id(store: RequestStore, ask: Ask) -> None:
    store.add(ask("a"))
    with pytest.raises(StorageError, match="request id req-a is taken"):
        store.add(ask("a", external_id="another"))


def test_unknown_names(store: RequestStore) -> None:
    for call in (store.get, lambda name: store.transition(name, S.WITHDRAWN)):
        with pytest.raises(NotFoundError, match="'nobody' does not exist"):
            call("nobody")
    for call in (store.batch, store.close_batch, lambda name: store.set_report(name, "0" * 64)):
        with pytest.raises(NotFoundError, match="batch 'never' does not exist"):
            call("never")
    assert store.find("flags", "nobody") is None


def test_list(store: RequestStore, ask: Ask) -> None:
    for name, model in (("a", "flags"), ("b", "faces"), ("c", "flags")):
        store.add(ask(name, model=model))
    store.drain("night-1", models=["faces"])
    names = lambda **filters: [record.request.id[-1] for record in store.list(**filters)]  # noqa: E731
    assert names() == ["a", "b", "c"]
    assert names(model="flags") == ["a", "c"]
    assert names(limit=2) == ["a", "b"]
    assert names(state=S.BATCHED) == names(batch="night-1") == ["b"]
    assert names(model="flags", state=S.BATCHED) == []
    assert [len(record.history) for record in store.list()] == [1, 2, 1]


def test_a_request_without_a_date_is_due_in_a_month(store: RequestStore, ask: Ask) -> None:
    today = datetime.now(UTC).date()
    record, _ = store.add(ask("a"))
    assert record.due is not None
    assert (record.due - record.accepted_at.date()).days == record.days_left(record.accepted_at.date()) == 28
    assert record.request.due is None, "what was asked stays as it was asked"
    assert store.add(ask("b", external_id="ticket-a"))[1] is False
    later = store.add(ask("c", due=today + timedelta(days=90)))[0]
    sooner = store.add(ask("d", due=today + timedelta(days=2)))[0]
    assert [r.request.id for r in store.list(by_due=True)] == ["req-d", "req-a", "req-c"]
    assert [r.request.id for r in store.list(by_due=True, after="req-d", limit=1)] == ["req-a"]
    assert [r.request.id for r in store.each(by_due=True, after="req-a")] == ["req-c"]
    assert (sooner.days_left(today), later.days_left(today)) == (2, 90)
    assert store.transition("req-d", S.WITHDRAWN).days_left(today) is None


def test_drain_order(store: RequestStore, ask: Ask) -> None:
    store.add(ask("late", due=date(2097, 2, 1)))
    store.add(ask("whenever"))
    store.add(ask("again"))
    store.add(ask("soon", due=date(2026, 1, 1)))
    store.add(ask("urgent", priority=5))
    store.add(ask("patient", priority=-1, due=date(2026, 1, 1)))
    batch = store.drain(None, limit=5)
    order = ["req-urgent", "req-soon", "req-whenever", "req-again", "req-late"]
    assert [request.id for request in batch.requests] == order
    assert list(store.batch(batch.id).requests) == order
    assert store.get("req-patient").state is S.ACCEPTED


def test_drain_again_gives_the_same(store: RequestStore, ask: Ask) -> None:
    store.add(ask("a"))
    first = store.drain("night-1")
    store.add(ask("b"))
    assert store.drain("night-1") == first
    assert store.drain(None) == first  # it is open: a new driver goes on with it
    store.transition("req-a", S.REMOVED)
    store.close_batch("night-1")
    assert store.drain("night-1") == first
    second = store.drain(None)
    assert second.id.startswith("night-20")
    assert [request.id for request in second.requests] == ["req-b"]
    assert [batch.id for batch in store.batches()] == ["night-1", second.id]


def test_drain_of_other_models_does_not_continue_a_foreign_batch(store: RequestStore, ask: Ask) -> None:
    store.add(ask("a", model="faces"))
    store.add(ask("b"))
    faces, flags = store.drain(None, models=["faces"]), store.drain(None, models=["flags"])
    assert [[r.id for r in batch.requests] for batch in (faces, flags)] == [["req-a"], ["req-b"]]
    assert store.drain(None, models=["flags"]) == flags


def test_drain_of_nothing(store: RequestStore) -> None:
    assert store.drain(None).requests == ()
    assert store.batches() == []
    assert store.drain("named").requests == ()
    assert store.batches() == []
    with pytest.raises(InputError, match="batch id 'a/b' is malformed"):
        store.drain("a/b")


def test_a_named_batch_of_nothing_does_not_swallow_what_comes_later(store: RequestStore, ask: Ask) -> None:
    store.drain("friday")
    store.add(ask("a"))
    assert [request.id for request in store.drain(None).requests] == ["req-a"]


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("name", ["friday", None])
def test_an_empty_batch_of_an_earlier_version_holds_nothing_back(
    store: RequestStore, anywhere: Settings, ask: Ask, name: str | None, closed: bool
) -> None:
    with Database(anywhere.database).write() as connection:
        connection.execute(text("INSERT INTO batches (id, created) VALUES ('friday', '2026-01-01 00:00:00')"))
    if closed:
        store.close_batch("friday")
    assert store.drain(None).requests == ()
    store.add(ask("a"))
    batch = store.drain(name)
    assert [request.id for request in batch.requests] == ["req-a"]
    assert store.drain(batch.id) == store.drain(None) == batch
    assert store.batch(batch.id).closed is None


def test_no_more_than_the_limit_and_the_rest_the_next_time(store: RequestStore, ask: Ask) -> None:
    for name in "abc":
        store.add(ask(name))
    first = store.drain(None, limit=2)
    assert [request.id for request in first.requests] == ["req-a", "req-b"]
    assert store.count(S.ACCEPTED) == 1
    assert [request.id for request in store.drain(None, limit=2, skip={first.id}).requests] == ["req-c"]


def test_more_requests_than_a_statement_takes(store: RequestStore, ask: Ask) -> None:
    many = 1_203
    store.add(ask("first"))
    with store.database.write() as connection:  # as `add` would, one by one
        trail = Trail(connection, store.vault, "somebody")
        for number in range(1, many):
            changes.accept(trail, ask(str(number)))
    assert len(store.drain("all").requests) == store.count(S.BATCHED) == many
    store.release_batch("all", "too many")
    assert store.count(S.ACCEPTED) == many


def test_the_drivers_of_a_batch_are_counted_until_it_gets_further(store: RequestStore, ask: Ask) -> None:
    store.add(ask("a"))
    batch = store.drain(None).id
    assert [store.start_batch(batch, advance) for advance in (0, 0, 2, 2, 2, 3, 1)] == [1, 2, 1, 2, 3, 1, 2]
    assert store.batch(batch).starts == 2
    with pytest.raises(NotFoundError, match="batch 'never' does not exist"):
        store.start_batch("never", 0)


def test_a_batch_that_is_given_up_gives_its_requests_back(store: RequestStore, ask: Ask) -> None:
    for name in ("done", "left"):
        store.add(ask(name))
    bad = store.drain(None)
    store.transition("req-done", S.REMOVED, batch=bad.id)
    store.add(ask("new"))
    for _ in range(2):
        store.release_batch(bad.id, "it ends with an error")
    fresh = store.drain(None)
    assert sorted(request.id for request in fresh.requests) == ["req-left", "req-new"]
    assert store.batch(bad.id).closed
    left = store.get("req-left")
    assert left.attempts == 0
    assert left.history[-2].detail == "it ends with an error"
    assert store.get("req-done").state is S.REMOVED


def test_other_open_batches_can_be_skipped(store: RequestStore, ask: Ask) -> None:
    store.add(ask("a"))
    first = store.drain(None)
    assert store.drain(None, skip={first.id}).requests == ()
    store.add(ask("b"))
    assert [request.id for request in store.drain(None, skip={first.id}).requests] == ["req-b"]


def test_what_no_model_holds_any_more_is_removed_again(store: RequestStore, ask: Ask) -> None:
    bring(store, ask("lost"), S.REMOVED)
    store.add(ask("new"))
    batch = store.drain(None)
    store.resurface(batch.id, ["req-lost"], "no champion holds it")
    assert [request.id for request in store.drain(batch.id).requests] == ["req-new", "req-lost"]
    record = store.get("req-lost")
    assert (record.state, record.batch, record.attempts) == (S.BATCHED, batch.id, 0)
    assert [event.state for event in record.history[-2:]] == [S.ACCEPTED, S.BATCHED]
    assert record.history[-2].detail == "no champion holds it"
    with pytest.raises(TransitionError, match="request req-new is batched, not removed"):
        store.resurface(batch.id, ["req-new", "req-lost"], "twice")


@pytest.mark.parametrize("attempt", [True, False])
def test_a_night_that_failed_for_a_reason_of_its_own_is_no_attempt(
    store: RequestStore, ask: Ask, attempt: bool
) -> None:
    bring(store, ask("a"), S.BATCHED)
    assert store.transition("req-a", S.ACCEPTED, attempt=attempt).attempts == attempt


def test_a_request_goes_through_several_batches(store: RequestStore, ask: Ask) -> None:
    store.add(ask("a"))
    store.drain("night-1")
    store.transition("req-a", S.ACCEPTED, detail="too near to the target", evidence={"shift": 0.1}, batch="night-1")
    record = store.get("req-a")
    assert (record.state, record.batch, record.attempts, record.evidence) == (S.ACCEPTED, "night-1", 1, {"shift": 0.1})
    store.close_batch("night-1")
    store.drain("night-2")
    with pytest.raises(TransitionError, match="req-a is in batch night-2, not in night-1"):
        store.transition("req-a", S.ACCEPTED, batch="night-1")
    store.transition("req-a", S.REMOVED, batch="night-2")
    record = store.get("req-a")
    assert (record.batch, record.attempts, record.evidence) == ("night-2", 1, {"shift": 0.1})
    states = [(event.state, event.batch) for event in record.history]
    assert states == [
        (S.ACCEPTED, None),
        (S.BATCHED, "night-1"),
        (S.ACCEPTED, "night-1"),
        (S.BATCHED, "night-2"),
        (S.REMOVED, "night-2"),
    ]
    assert record.history[2].detail == "too near to the target"
    assert store.batch("night-1").requests == store.batch("night-2").requests == ("req-a",)


def test_every_state_fits_its_column_where_the_database_enforces_it() -> None:
    assert str(metadata.tables["requests"].c.state.type.compile()) == "VARCHAR(16)"
    assert max(map(len, S)) <= 16


@pytest.mark.parametrize(("here", "to"), list(product(WAY, WAY)))
def test_lifecycle(store: RequestStore, ask: Ask, here: RequestState, to: RequestState) -> None:
    bring(store, ask("a"), here)
    before = store.get("req-a")
    if to is here:
        assert store.transition("req-a", to, detail="again") == before
    elif to in ALLOWED[here]:
        after = store.transition("req-a", to)
        assert after.state is to
        assert len(after.history) == len(before.history) + 1
        assert after.attempts - before.attempts == (here is S.BATCHED and to in (S.ACCEPTED, S.FAILED))
    else:
        with pytest.raises(TransitionError, match=f"request req-a is {here} and cannot become {to}: "):
            store.transition("req-a", to)
        assert store.get("req-a") == before


def test_batch_report_and_close(store: RequestStore, ask: Ask) -> None:
    store.add(ask("a"))
    store.drain("night-1")
    store.set_report("night-1", "f" * 64)
    with pytest.raises(InputError, match="report 'x' is malformed"):
        store.set_report("night-1", "x")
    with pytest.raises(TransitionError, match="1 undecided"):
        store.close_batch("night-1")
    assert store.batch("night-1").closed is None
    store.transition("req-a", S.FAILED)
    store.close_batch("night-1")
    closed = store.batch("night-1")
    store.close_batch("night-1")
    assert store.batch("night-1") == closed
    assert closed.report == "f" * 64
    assert closed.closed is not None
    assert closed.closed >= closed.created


def test_concurrent_threads_accept_and_drain_once(anywhere: Settings, ask: Ask) -> None:
    def work(worker: int) -> tuple[int, list[str]]:
        store = open_store(anywhere)
        new = sum(store.add(ask(f"{i}-{worker}", external_id=f"ticket-{i}"))[1] for i in range(8))
        return new, [request.id for request in store.drain(f"night-{worker}").requests]

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(work, range(4)))
    drained = [name for _, names in done for name in names]
    assert sum(new for new, _ in done) == 8
    assert len(drained) == len(set(drained)) == 8
    assert open_store(anywhere).list(state=S.ACCEPTED) == []


def test_concurrent_processes_open_a_fresh_store_and_accept_once(anywhere: Settings) -> None:
    script = """
import sys
from expunge.requests.store import open_store
from expunge.settings import load_settings
from expunge.types import RemovalRequest
store = open_store(load_settings())
for i in range(10):
    fields = {"id": f"req-{sys.argv[1]}-{i}", "model": "flags", "images": ("0" * 64,), "external_id": f"ticket-{i}"}
    print(int(store.add(RemovalRequest(**fields))[1]))
"""
    runs = [subprocess.Popen([sys.executable, "-c", script, name], stdout=subprocess.PIPE) for name in "ab"]
    outputs = [run.communicate(timeout=120)[0].split() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sum(int(word) for output in outputs for word in output) == 10
    assert len(open_store(anywhere).list()) == 10


def test_locked(settings: Settings, ask: Ask) -> None:
    open_store(settings)
    impatient = open_store(settings, patience=0.05)
    with (
        Database(settings.database).write(),
        pytest.raises(UnavailableError, match=rf"is locked by \S+ \(pid {os.getpid()}\): wait for it"),
    ):
        impatient.add(ask("a"))
    assert impatient.add(ask("a"))[1]


def test_a_patient_store_waits_for_the_lock(settings: Settings, ask: Ask) -> None:
    store = open_store(settings, patience=60)
    with ThreadPoolExecutor(1) as pool:
        with Database(settings.database).write():
            accepted = pool.submit(store.add, ask("a"))
            time.sleep(0.5)
            assert not accepted.done()
        assert accepted.result(timeout=30)[1]


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_nobody_else_can_read_the_database(settings: Settings, ask: Ask, umask: int) -> None:
    before = os.umask(umask)
    try:
        store = open_store(settings)
        store.add(ask("a"))
        with Database(settings.database).write():  # the log and its index are there meanwhile
            modes = {path.name: path.stat().st_mode & 0o777 for path in (settings.home, *settings.home.iterdir())}
    finally:
        os.umask(before)
    assert {"expunge.db", "expunge.db-wal", "home.json"} <= set(modes)
    assert not [name for name, mode in modes.items() if mode & 0o077], modes


def test_read_only(settings: Settings, ask: Ask) -> None:
    open_store(settings).close()
    url = f"sqlite:///file:{settings.home / 'expunge.db'}?mode=ro&uri=true"
    with pytest.raises(StorageError, match=r"cannot be written .*readonly"):
        RequestStore(Database(url), Vault(sealing_key(settings)), settings.home, "somebody").add(ask("a"))


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("sqlite:///{home}/broken.db", StorageError, "is damaged .*: restore it from a backup"),
        ("sqlite:///{home}/broken.db/expunge.db", StorageError, "cannot be made"),
        ("sqlite:///{home}", StorageError, "cannot be opened"),
        ("sqlite://", InputError, "^database_url: a database in memory forgets every request"),
        ("words", InputError, "^database_url: not a SQLAlchemy URL"),
        ("nonesuch://host/db", InputError, "^database_url: .*: install the database driver"),
    ],
)
def test_no_database(settings: Settings, url: str, kind: type[ExpungeError], message: str) -> None:
    settings.home.mkdir()
    (settings.home / "broken.db").write_bytes(b"no database at all" * 100)
    wrong = settings.model_copy(update={"database_url": url.format(home=settings.home)})
    with pytest.raises(kind, match=message) as caught:
        open_store(wrong)
    assert "\n" not in str(caught.value)


def test_database_of_a_newer_version(settings: Settings) -> None:
    open_store(settings)
    with Database(settings.database).write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StorageError, match=r"made by another version of expunge .*: upgrade expunge"):
        open_store(settings)


def test_migrations_make_the_tables_that_the_code_uses(anywhere: Settings) -> None:
    open_store(anywhere)
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).with_name("migrations")))
    assert ScriptDirectory.from_config(config).get_current_head() == database.HEAD
    with Database(anywhere.database).read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_current_database_opens_without_alembic(settings: Settings) -> None:
    open_store(settings)
    script = """
import sys
from expunge.requests.store import open_store
from expunge.settings import load_settings
open_store(load_settings())
print("alembic" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_error_of_the_database_quotes_no_value(store: RequestStore) -> None:
    with pytest.raises(IntegrityError, match=r"(?i)not.null") as caught, store.database.write() as connection:
        connection.execute(text("INSERT INTO requests (id, body) VALUES ('r', :body)"), {"body": "a private prompt"})
    assert "private" not in str(caught.value)
