"""Leases: exactly one holder, whom the others can name; freed by its end, its death or its silence."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from threading import Barrier

import pytest
from sqlalchemy import text, update

from expunge.errors import UnavailableError
from expunge.requests.database import Database
from expunge.requests.leases import HeldError, holder, lease
from expunge.requests.store import RequestStore, open_store
from expunge.requests.tables import leases
from expunge.settings import Settings
from expunge.types import RemovalRequest
from tests.requests.conftest import made_by_an_earlier_release

NAME = "night:friday"

FORK = get_context("fork")  # a new interpreter would import for seconds


class Other:
    """Another process, which holds the lease until it is told to end."""

    def __init__(self, settings: Settings, ttl: float) -> None:
        self._pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=_hold, args=(settings, ttl, theirs), daemon=True)
        self.process.start()
        assert self._pipe.recv() == "held"

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def check(self) -> str:
        self._pipe.send("check")
        return self._pipe.recv()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def end(self) -> None:
        self._pipe.send("end")
        self.process.join()
        assert self.process.exitcode == 0


def _hold(settings: Settings, ttl: float, pipe: Connection) -> None:
    with lease(open_store(settings), NAME, ttl=ttl) as held:
        pipe.send("held")
        while pipe.recv() == "check":
            try:
                held.check()
                pipe.send("still held")
            except UnavailableError:
                pipe.send("lost" if held.lost.is_set() else "unsure")


Start = Callable[..., Other]


@pytest.fixture
def other(anywhere: Settings, store: RequestStore) -> Iterator[Start]:
    started: list[Other] = []

    def start(ttl: float = 60.0) -> Other:
        started.append(Other(anywhere, ttl))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.join()


def moved_to_another_node(store: RequestStore) -> None:
    """As if its holder ran elsewhere, where nobody here can see whether it lives."""
    with store.database.write() as connection:
        connection.execute(update(leases).values(node="elsewhere", place="another kernel"))


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_lease_names_its_holder_and_ends_with_its_block(store: RequestStore) -> None:
    assert holder(store, NAME) is None
    with lease(store, NAME) as held:
        held.check()
        by = holder(store, NAME)
        assert by is not None
        assert (by.node, by.pid) == (socket.gethostname(), os.getpid())
        assert by.acquired <= by.heartbeat < by.expires
        assert by.acquired.utcoffset() is not None
        assert holder(store, "night:saturday") is None
    assert holder(store, NAME) is None
    with lease(store, NAME):
        pass


def test_a_block_that_fails_frees_its_lease(store: RequestStore) -> None:
    with pytest.raises(RuntimeError, match="boom"), lease(store, NAME):
        raise RuntimeError("boom")
    assert holder(store, NAME) is None


@pytest.mark.parametrize("wait", [False, True])
def test_no_lease_is_held_twice_by_one_thread(store: RequestStore, wait: bool) -> None:
    with (
        lease(store, NAME) as held,
        pytest.raises(HeldError, match=f"process {os.getpid()} "),
        lease(store, NAME, wait=wait),
    ):
        pytest.fail("a lease was given twice")
    assert not held.lost.is_set()
    with lease(store, NAME, wait=wait), lease(store, "night:saturday", wait=wait):
        pass


def test_another_process_is_told_who_holds_it(store: RequestStore, other: Start) -> None:
    holding = other()
    with pytest.raises(HeldError, match=NAME) as caught, lease(store, NAME):
        pytest.fail("a lease was given twice")
    assert isinstance(caught.value, UnavailableError)
    assert caught.value.exit_code == 5
    assert (caught.value.holder.node, caught.value.holder.pid) == (socket.gethostname(), holding.pid)
    for word in (str(holding.pid), socket.gethostname(), f"{caught.value.holder.expires:%H:%M:%S}"):
        assert word in str(caught.value)
    assert holding.check() == "still held"
    holding.end()
    with lease(store, NAME):
        pass


def test_whoever_waits_gets_it_when_it_is_free(store: RequestStore, other: Start) -> None:
    holding = other()
    with ThreadPoolExecutor(1) as pool:

        def work() -> int:
            with lease(store, NAME, wait=True):
                by = holder(store, NAME)
                return by.pid if by else 0

        waiting = pool.submit(work)
        time.sleep(1)
        assert not waiting.done()
        holding.end()
        assert waiting.result(timeout=120) == os.getpid()


def test_one_that_was_killed_here_frees_it_at_once(store: RequestStore, other: Start) -> None:
    holding = other(ttl=3600.0)
    holding.process.kill()  # not collected yet: a zombie holds nothing
    until(lambda: holder(store, NAME) is None)
    holding.process.join()
    with lease(store, NAME) as held:
        held.check()


def test_a_pid_that_now_means_another_process_holds_nothing(store: RequestStore, other: Start) -> None:
    other(ttl=3600.0)
    with store.database.write() as connection:
        connection.execute(update(leases).values(pid=os.getpid()))
    assert holder(store, NAME) is None


def test_one_that_was_killed_elsewhere_holds_it_until_it_expires(store: RequestStore, other: Start) -> None:
    other().process.kill()
    moved_to_another_node(store)
    with pytest.raises(HeldError, match="elsewhere"), lease(store, NAME):
        pytest.fail("the lease was given twice")


def test_one_that_was_killed_elsewhere_frees_it_when_it_expires(store: RequestStore, other: Start) -> None:
    other(ttl=2.0).process.kill()
    moved_to_another_node(store)
    with lease(store, NAME, wait=True):
        by = holder(store, NAME)
        assert by is not None
        assert by.pid == os.getpid()


def test_a_heartbeat_renews_it(store: RequestStore, other: Start) -> None:
    other(ttl=8.0)
    first = holder(store, NAME)
    assert first is not None

    def renewed() -> bool:
        by = holder(store, NAME)
        return (
            by is not None
            and by.acquired == first.acquired
            and by.heartbeat > first.heartbeat
            and by.expires > first.expires
        )

    until(renewed)


def test_a_paused_holder_finds_out_that_it_was_taken_over(store: RequestStore, other: Start) -> None:
    holding = other(ttl=1.0)
    holding.signal(signal.SIGSTOP)
    until(lambda: holder(store, NAME) is None)
    with lease(store, NAME) as mine:
        holding.signal(signal.SIGCONT)
        assert holding.check() == "lost"
        mine.check()
    holding.end()
    assert holder(store, NAME) is None


def test_a_holder_that_nobody_replaced_goes_on(store: RequestStore, other: Start) -> None:
    holding = other(ttl=6.0)
    holding.signal(signal.SIGSTOP)
    until(lambda: holder(store, NAME) is None)
    holding.signal(signal.SIGCONT)
    assert holding.check() == "still held"


def test_a_database_that_is_away_for_too_long_costs_the_lease(settings: Settings) -> None:
    store = open_store(settings)
    with lease(store, NAME, ttl=1.0) as held:
        with Database(settings.database).write():  # locks out everybody
            assert held.lost.wait(timeout=60)
        with pytest.raises(UnavailableError, match=NAME):
            held.check()
    assert holder(store, NAME) is None


def test_a_database_that_hangs_costs_the_lease(anywhere: Settings) -> None:
    store = open_store(anywhere)
    if store.database.name.startswith("sqlite"):
        pytest.skip("SQLite waits no longer than it is told to")
    with store.database.write() as connection, lease(store, NAME, ttl=1.0) as held:
        connection.execute(text("LOCK TABLE leases IN ACCESS EXCLUSIVE MODE"))
        assert held.lost.wait(timeout=60)
        with pytest.raises(UnavailableError, match=NAME):
            held.check()


def test_a_database_that_is_away_for_a_moment_costs_nothing(settings: Settings) -> None:
    store = open_store(settings)
    with lease(store, NAME, ttl=8.0) as held:
        with Database(settings.database).write():
            held.check()
        held.check()
        assert not held.lost.is_set()


def test_a_lease_that_somebody_removed_is_lost(store: RequestStore) -> None:
    with lease(store, NAME) as held:
        with store.database.write() as connection:
            connection.execute(leases.delete())
        with pytest.raises(UnavailableError, match="lost"):
            held.check()
        assert held.lost.is_set()


WRONG_CLOCK = """
import datetime, sys, time
real, shift = time.time, 3600.0 * int(sys.argv[1])
time.time = lambda: real() + shift
class Wrong(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds=shift)
datetime.datetime = Wrong
from expunge.requests.leases import HeldError, lease
from expunge.requests.store import open_store
from expunge.settings import load_settings
store = open_store(load_settings())
try:
    with lease(store, "night:friday"):
        pass
except HeldError:
    print("refused", flush=True)
sys.stdin.readline()
with lease(store, "night:friday"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_node_whose_clock_is_wrong_agrees_with_the_others(store: RequestStore, hours: int) -> None:
    """Python's clocks are set wrong in the other process, which judges and is judged like any other."""
    ask, pipe = [sys.executable, "-c", WRONG_CLOCK, str(hours)], subprocess.PIPE
    with subprocess.Popen(ask, stdin=pipe, stdout=pipe, text=True) as wrong:
        assert wrong.stdin is not None
        assert wrong.stdout is not None
        with lease(store, NAME):
            moved_to_another_node(store)
            assert wrong.stdout.readline() == "refused\n"
        print(file=wrong.stdin, flush=True)
        assert wrong.stdout.readline() == "held\n"
        moved_to_another_node(store)
        by = holder(store, NAME)
        assert by is not None
        assert by.expires - by.heartbeat == timedelta(seconds=60)
        assert abs((by.heartbeat - datetime.now(UTC)).total_seconds()) < 600
        wrong.kill()


def test_of_eight_that_come_together_one_gets_it(anywhere: Settings) -> None:
    store = open_store(anywhere)
    together = Barrier(8)

    def come(_: int) -> bool:
        mine = open_store(anywhere)
        together.wait()
        try:
            with lease(mine, NAME):
                together.wait()  # nobody leaves before all have tried
                return True
        except HeldError:
            together.wait()
            return False

    for _ in range(3):
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(come, range(8))) == 1
        assert holder(store, NAME) is None


def test_eight_processes_that_wait_hold_it_one_after_the_other(anywhere: Settings) -> None:
    open_store(anywhere).close()
    inside = anywhere.home / "inside"

    def work() -> None:
        with lease(open_store(anywhere, patience=120), "promote:flags", wait=True):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            time.sleep(0.1)
            inside.unlink()

    runs = [FORK.Process(target=work, daemon=True) for _ in range(8)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0] * 8


def test_a_database_from_before_leases_is_upgraded_with_its_rows(
    anywhere: Settings, ask: Callable[..., RemovalRequest]
) -> None:
    made_by_an_earlier_release(anywhere, "0002", ask("a"))
    upgraded = open_store(anywhere)
    with lease(upgraded, NAME) as held:
        held.check()
    assert upgraded.get("req-a").request == ask("a")
