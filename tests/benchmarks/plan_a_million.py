"""Store, queue and planner with a long queue: `python -m tests.benchmarks.plan_a_million [COUNT]`.

Prints, for each step, its seconds and the largest amount of memory that Python held in it. The store is a new SQLite
database in a temporary folder; requests are written in bulk, as intake would not be what is measured.
"""

import argparse
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from datetime import date, timedelta
from typing import TypeVar

from sqlalchemy import insert

from expunge.batch.outlook import outlook
from expunge.batch.queue import capacity
from expunge.requests.changes import now
from expunge.requests.store import RequestStore, open_store
from expunge.requests.tables import requests
from expunge.settings import NightSettings, load_settings
from expunge.types import RemovalRequest, RequestState

T = TypeVar("T")

PART = 5_000
MODELS = ("faces", "flags", "people")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=1_000_000)
    count = parser.parse_args().count
    with tempfile.TemporaryDirectory() as home:
        os.environ["EXPUNGE_HOME"] = home
        settings = load_settings()
        settings = settings.model_copy(update={"night": NightSettings(hours=1e-4, gpus=1)})
        store = open_store(settings)
        measured("write", lambda: fill(store, count))
        night = measured("capacity", lambda: capacity(store, settings, lambda: None))
        assert night is not None
        measured("count", lambda: store.total())
        measured("list a page", lambda: store.list(limit=100, history=False))
        measured("list each", lambda: sum(1 for _ in store.each()))
        batch = measured("drain", lambda: store.drain(None, limit=settings.night_limit, choose=night.choose))
        left = measured("outlook", lambda: outlook(store.expected(), len(batch.requests), date.today()))
        print(f"{len(batch.requests)} requests in the night; {left}")
        store.close()


def fill(store: RequestStore, count: int) -> None:
    """Write requests of three models, every tenth with a due date, a few with another priority."""
    at, today = now(), date.today()
    for start in range(0, count, PART):
        asked = [
            RemovalRequest(
                id=f"req-{i}",
                model=MODELS[i % len(MODELS)],
                images=("0" * 64,),
                external_id=f"ticket-{i}",
                due=today + timedelta(days=i % 365) if i % 10 == 0 else None,
                priority=1 if i % 1000 == 0 else 0,
            )
            for i in range(start, min(count, start + PART))
        ]
        sealed = [store.vault.new(one.id) for one in asked]
        with store.database.write() as connection:
            connection.execute(
                insert(requests),
                [
                    {
                        **{name: getattr(one, name) for name in ("id", "model", "priority", "due")},
                        "external_id": store.vault.external_id(one.model, one.external_id),
                        "data_key": envelope.wrapped,
                        "state": RequestState.ACCEPTED,
                        "attempts": 0,
                        "accepted_at": at,
                        "body": envelope.close("body", one.model_dump_json()),
                    }
                    for one, envelope in zip(asked, sealed, strict=True)
                ],
            )


def measured(step: str, run: Callable[[], T]) -> T:
    tracemalloc.start()
    began = time.monotonic()
    made = run()
    seconds, peak = time.monotonic() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{step:12} {seconds:8.1f} s {peak / 1e6:8.1f} MB", flush=True)
    return made


if __name__ == "__main__":
    main()
