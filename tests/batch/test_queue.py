"""Which batches a night runs, also where the clock was set back since the last one."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update

from expunge.batch.queue import batches_to_run
from expunge.requests.store import RequestStore
from expunge.requests.tables import batches
from expunge.types import RemovalRequest

Ask = Callable[..., RemovalRequest]


@pytest.mark.parametrize("ahead", [timedelta(), timedelta(days=400)], ids=["right", "set back"])
def test_what_an_earlier_night_left_open_and_what_waits_are_both_run(
    store: RequestStore, ask: Ask, ahead: timedelta
) -> None:
    """The clock was 400 days ahead when the open batch was made, and has been set back since."""
    store.add(ask("open"))
    left = store.drain(None).id
    with store.database.write() as connection:
        connection.execute(update(batches).values(created=datetime.now(UTC) + ahead))
    store.add(ask("waits"))
    ran = [
        (batch.id == left, [r.id for r in batch.requests], more) for batch, more in batches_to_run(store, None, None, 9)
    ]
    assert ran == [(True, ["req-open"], True), (False, ["req-waits"], False)]


def test_a_named_batch_is_run_alone(store: RequestStore, ask: Ask) -> None:
    store.add(ask("open"))
    left = store.drain(None).id
    store.add(ask("waits"))
    assert [(batch.id, more) for batch, more in batches_to_run(store, left, None, 9)] == [(left, False)]
