"""Which batches one night runs: what earlier nights left open, then what waits."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from expunge.requests.changes import Choose
from expunge.requests.store import RequestStore
from expunge.runs.night import refuse_replay
from expunge.settings import Settings
from expunge.types import RemovalBatch

if TYPE_CHECKING:
    from expunge.batch.capacity import Capacity


def capacity(
    store: RequestStore, settings: Settings, cluster: Callable[[], tuple[int, int] | None]
) -> "Capacity | None":
    """Return what picks the requests that fit into `night.hours`; None where that sets no limit.

    cluster: asks Ray how many GPUs and CPU cores it has. Raises InputError if neither Ray nor `night.gpus` says it.
    """
    if settings.night.hours is None:
        return None
    # Not at the top: the cost model imports diffusers, which takes seconds.
    from expunge.batch.capacity import capacity_of

    gpus, cores = cluster() or (0, 0)
    return capacity_of(store, settings, settings.night.hours, gpus=gpus, cores=cores)


def batches_to_run(
    store: RequestStore,
    batch_id: str | None,
    models: Sequence[str] | None,
    limit: int | None,
    *,
    only: Collection[str] | None = None,
    lost: Callable[[], bool] | None = None,
    choose: Choose | None = None,
) -> Iterator[tuple[RemovalBatch, bool]]:
    """Drain one batch at a time, and say with each whether the queue will be asked for another.

    Open batches come first, then one new batch of what waits; with `batch_id`, that batch alone. A batch is drained
    only when it is asked for. models, limit, only, choose: as `RequestStore.drain` takes them. lost: says of an empty
    queue whether removals were lost, which a batch without requests puts right.
    """
    if batch_id is not None:
        refuse_replay(batch_id)
    done: list[str] = []
    while True:
        # Not told from the time at which the batch was made: a clock can be set back in between.
        left = None if batch_id is not None else store.oldest_open(models, done, only)
        batch = store.drain(left or batch_id, models, limit, skip=done, only=only, choose=choose)
        if not batch.requests and (done or lost is None or not lost()):
            return
        yield batch, left is not None
        if left is None:
            return
        done.append(batch.id)
