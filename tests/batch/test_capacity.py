"""A night takes what fits into its hours, in the queue's order; the rest waits, and is told until when."""

import tracemalloc
from collections.abc import Callable
from datetime import date

import pytest

from expunge.batch.capacity import Capacity, hours_on_cpus
from expunge.batch.cost import Load
from expunge.batch.outlook import outlook
from expunge.batch.queue import batches_to_run, capacity
from expunge.errors import InputError
from expunge.requests.store import RequestStore
from expunge.settings import NightSettings, Settings
from expunge.types import RemovalRequest, RequestState

Ask = Callable[..., RemovalRequest]

TODAY = date(2026, 3, 1)


def fits(hours: float, models: tuple[str, ...] = ("flags", "faces")) -> Capacity:
    """Two hours per job of flags and one per request; faces take ten per request."""

    def cost(model: str, load: Load) -> float:
        return 2 + load.requests if model == "flags" else 10.0 * load.requests

    return Capacity(hours, cost, lambda request: Load(1), frozenset(models))


def test_a_night_takes_what_fits_by_priority_due_date_and_arrival(store: RequestStore, ask: Ask) -> None:
    for request in (
        ask("later"),
        ask("due", due=date(2026, 4, 1)),
        ask("urgent", priority=1),
        ask("sooner", due=date(2026, 3, 5)),
    ):
        store.add(request)
    ((batch, _),) = batches_to_run(store, None, None, 512, choose=fits(5).choose)
    assert [request.id for request in batch.requests] == ["req-urgent", "req-sooner", "req-due"]
    assert store.count(RequestState.ACCEPTED) == 1
    left = outlook(store.expected(), 3, TODAY)
    assert (left.left, left.last, left.late) == (1, date(2026, 3, 2), 0)


def test_what_does_not_fit_closes_the_night_for_its_model_alone(ask: Ask) -> None:
    queue = [ask("a", model="faces"), ask("b"), ask("c", model="faces"), ask("d"), ask("e", model="faces")]
    assert [r.id for r in fits(14).choose(iter(queue))] == ["req-a", "req-b", "req-d"]
    read = iter(queue)
    assert not list(fits(1).choose(read))
    assert [r.id for r in read] == ["req-c", "req-d", "req-e"], "nothing more is read once no model can go on"


def test_a_model_that_no_night_can_hold_is_named(ask: Ask) -> None:
    night = fits(9)
    assert [r.id for r in night.choose(iter([ask("a", model="faces"), ask("b")]))] == ["req-b"]
    assert night.too_long == {"faces": 10.0}


def test_five_thousand_requests_are_not_one_job(store: RequestStore, settings: Settings, ask: Ask) -> None:
    hours = settings.model_copy(update={"night": NightSettings(hours=1e-4, gpus=1, gpu="h100")})
    store.add(ask("first"))
    night = capacity(store, hours, lambda: None)
    assert night is not None
    taken = list(night.choose(ask(f"r{i}") for i in range(5000)))
    assert 0 < len(taken) < 500
    load = sum((night.load(request) for request in taken), Load())
    assert night.hours("flags", load) <= 1e-4 < night.hours("flags", load + night.load(taken[0]))


def test_hours_need_to_know_what_there_is(store: RequestStore, settings: Settings, ask: Ask) -> None:
    assert capacity(store, settings, lambda: None) is None
    store.add(ask("a"))
    limited = settings.model_copy(update={"night": NightSettings(hours=1)})
    with pytest.raises(InputError, match="cannot be told what Ray has"):
        capacity(store, limited, lambda: None)
    fast, slow = capacity(store, limited, lambda: (4, 8)), capacity(store, limited, lambda: (0, 8))
    assert fast is not None
    assert slow is not None
    load = fast.load(ask("b"))
    assert slow.hours("flags", load) > 100 * fast.hours("flags", load) > 0
    assert fast.hours("birds", load) == 0, "planning refuses it, and says why"


def test_a_night_on_cpus_takes_as_long_as_its_queue(store: RequestStore, settings: Settings, ask: Ask) -> None:
    assert hours_on_cpus(store, settings, 2, None) == 0
    store.add(ask("a"))
    one = hours_on_cpus(store, settings, 2, None)
    for i in range(9):
        store.add(ask(f"r{i}"))
    assert hours_on_cpus(store, settings, 2, None) > one > 0
    assert hours_on_cpus(store, settings, 4, None) == pytest.approx(hours_on_cpus(store, settings, 2, None) / 2)
    assert hours_on_cpus(store, settings, 2, ["faces"]) == 0


def test_the_outlook_counts_due_dates_that_cannot_be_met(store: RequestStore, ask: Ask) -> None:
    for i in range(10):
        store.add(ask(f"r{i}", due=date(2026, 3, 3)))
    left = outlook(store.expected(), 4, TODAY)
    assert (left.left, left.last, left.late, left.nearest) == (10, date(2026, 3, 4), 2, date(2026, 3, 3))
    assert "2 due dates cannot be met, the first is 2026-03-03" in str(left)
    none = outlook(store.expected(), 0, TODAY)
    assert (none.last, none.late) == (None, 10)


def test_a_long_queue_is_read_in_parts(store: RequestStore, ask: Ask) -> None:

    from expunge.requests import changes
    from expunge.requests.audit import Trail

    count = 20_000
    with store.database.write() as connection:
        trail = Trail(connection, store.vault, "somebody")
        for i in range(count):
            changes.accept(trail, ask("a", id=f"r{i}", external_id=f"r{i}"))
    tracemalloc.start()
    assert outlook(store.expected(), 16, TODAY).left == count
    assert len(store.drain(None, limit=16).requests) == 16
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000, f"{count} requests must not be held at once"
