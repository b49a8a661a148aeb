"""What a purge takes out of the nights that a request was in, and what the next night makes of it."""

from datetime import UTC, datetime, timedelta

import pytest

from expunge.batch.purging import due, purge, purge_due, replayable
from expunge.errors import TransitionError
from expunge.requests.blobs import BlobStore, open_blobs
from expunge.requests.store import RequestStore, open_store
from expunge.runs.night import NightFolder
from expunge.runs.outcomes import NightPlan
from expunge.settings import Settings, load_settings
from expunge.types import Evidence, PreparedJob, RemovalRequest, RequestState
from tests.batch.conftest import Ask
from tests.runs.conftest import make_job


@pytest.fixture
def settings() -> Settings:
    return load_settings()


@pytest.fixture
def store(settings: Settings) -> RequestStore:
    return open_store(settings)


@pytest.fixture
def blobs(settings: Settings) -> BlobStore:
    return open_blobs(settings)


def a_night(settings: Settings, store: RequestStore, blobs: BlobStore, *requests: RemovalRequest) -> NightFolder:
    """A night that has trained on these requests, and has not ended."""
    for request in requests:
        store.add(request)
    batch = store.drain("night-1")
    job = make_job("flags", batch=batch.id, requests=batch.requests)
    night = NightFolder(settings.runs / batch.id)
    night.plan_once(lambda: NightPlan(batch=batch.id, jobs=(job,), refused={}))
    folder = night.job(job.id)
    made = {request.id: blobs.put(f"surrogate of {request.id}".encode()) for request in requests}
    shown = {request.id: blobs.put(f"evidence of {request.id}".encode()) for request in requests}
    forget, retain, conditioning = (blobs.put(name) for name in (b"forget", b"retain", b"conditioning"))
    surrogates = {id: (blob,) for id, blob in made.items()}
    folder.prepared.write(
        PreparedJob(
            job=job.id,
            forget=forget,
            retain=retain,
            conditioning=conditioning,
            unrelated_prompts=1,
            surrogates=surrogates,
        )
    )
    folder.evidence.write(Evidence(job=job.id, requests=(), integrity=None, pictures=shown))
    store.set_report(batch.id, blobs.put(b"a report"))
    return night


def test_nothing_of_a_purged_request_is_left_in_its_night(
    settings: Settings, store: RequestStore, blobs: BlobStore, ask: Ask
) -> None:
    mine = ask("a", images=[blobs.put(b"mine"), blobs.put(b"ours")], prompt="jane doe at the lake")
    other = ask("b", images=[blobs.put(b"ours")])
    night = a_night(settings, store, blobs, mine, other)
    store.transition("req-a", RequestState.REMOVED)
    with pytest.raises(TransitionError, match="open batch night-1"):
        purge(settings, store, blobs, "req-a")
    store.transition("req-b", RequestState.REMOVED)
    store.close_batch("night-1")

    said = purge(settings, store, blobs, "req-a", dry_run=True)
    assert (said.pictures, said.shared, said.nights) == (1, 1, ("night-1",))
    assert store.get("req-a").request == mine
    assert purge(settings, store, blobs, "req-a") == said

    left = {blobs.get(blob) for blob in blobs.ids()}
    assert left == {b"ours", b"retain", b"surrogate of req-b", b"evidence of req-b"}
    assert store.batch("night-1").report is None
    planned = night.plan
    assert planned is not None
    [job] = planned.jobs
    assert job == night.job(job.id).job.read()
    first, second = job.requests
    assert (first.id, first.prompt, first.external_id == mine.external_id) == ("req-a", None, False)
    assert second == other
    assert "2 pictures" not in str(said)


def test_a_purged_removal_leaves_the_ledger(
    settings: Settings, store: RequestStore, blobs: BlobStore, ask: Ask
) -> None:
    a_night(settings, store, blobs, ask("a"), ask("b"))
    for id in ("req-a", "req-b"):
        store.transition(id, RequestState.REMOVED)
    store.close_batch("night-1")
    assert [request.id for request in replayable(store, ["req-a", "req-b"])] == ["req-a", "req-b"]
    purge(settings, store, blobs, "req-a")
    assert [request.id for request in replayable(store, ["req-a", "req-b"])] == ["req-b"]


def test_what_is_due_goes_by_the_last_move_and_not_by_notes(
    settings: Settings, store: RequestStore, blobs: BlobStore, ask: Ask
) -> None:
    keep = settings.retention.model_copy(update={"failed": 10})
    settings = settings.model_copy(update={"retention": keep})
    a_night(settings, store, blobs, ask("a"), ask("b"))
    store.transition("req-a", RequestState.FAILED)
    store.transition("req-b", RequestState.REMOVED)
    store.close_batch("night-1")
    now = datetime.now(UTC)
    assert due(settings, store, now + timedelta(days=9)) == []
    assert due(settings, store, now + timedelta(days=11)) == ["req-a"]
    purge_due(settings.model_copy(update={"retention": keep.model_copy(update={"failed": 0})}), store, blobs)
    assert [store.get(id).state for id in ("req-a", "req-b")] == [RequestState.PURGED, RequestState.REMOVED]
    assert store.verify_audit().problem is None
