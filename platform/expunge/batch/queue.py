"""Which batches one night runs: what earlier nights left open, then what waits."""

from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import UTC, datetime

from expunge.requests.store import RequestStore
from expunge.types import RemovalBatch


def batches_to_run(
    store: RequestStore,
    batch_id: str | None,
    models: Sequence[str] | None,
    limit: int | None,
    *,
    only: Collection[str] | None = None,
    lost: Callable[[], bool] | None = None,
) -> Iterator[tuple[RemovalBatch, bool]]:
    """Drain one batch at a time, and say with each whether the queue will be asked for another.

    Open batches come first, then one new batch of what waits; with `batch_id`, that batch alone. A batch is drained
    only when it is asked for. models, limit, only: as `RequestStore.drain` takes them. lost: says of an empty queue
    whether removals were lost, which a batch without requests puts right.
    """
    began = datetime.now(UTC)
    done: list[str] = []
    while True:
        batch = store.drain(batch_id, models, limit, skip=done, only=only)
        if not batch.requests and (done or lost is None or not lost()):
            return
        more = batch_id is None and batch.created < began
        yield batch, more
        if not more:
            return
        done.append(batch.id)
