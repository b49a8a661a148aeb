"""Destroys what is kept of requests: pictures, texts, and what nights have made of them; ids and digests stay.

The pictures go first and the data key last, so that a purge that was killed goes on when it is repeated. What a night
made of several requests together (its report, its tensors) goes with the first of them. Weights and registered versions
stay: `expunge prune` deletes those. Copies elsewhere are not reached: backups, a database server's log, and the
checkpoints at training.checkpoint_url.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from expunge.errors import ExpungeError, NotFoundError, TransitionError
from expunge.logs import get_logger
from expunge.requests import lifecycle
from expunge.requests.blobs import BlobStore
from expunge.requests.inventory import needed_by_others
from expunge.requests.records import RequestRecord
from expunge.requests.store import RequestStore
from expunge.runs.job import JobFolder
from expunge.runs.night import NightFolder
from expunge.settings import Settings
from expunge.types import RemovalRequest, RequestState, UnlearnJob


@dataclass(frozen=True)
class Certificate:
    """What a purge has destroyed of one request. It is kept in the audit log."""

    request: str
    state: RequestState
    """The state before."""
    pictures: int
    shared: int
    """Pictures that stay, because another request needs them."""
    nights: tuple[str, ...]
    """The nights whose report, tensors and pictures of evidence went with it."""

    def __str__(self) -> str:
        kept = f"; {self.shared} stay, which another request needs" if self.shared else ""
        nights = f"; the reports and tensors of {', '.join(self.nights)}" if self.nights else ""
        return f"destroyed: its texts and their key; {self.pictures} pictures{kept}{nights}"


def due(settings: Settings, store: RequestStore, now: datetime | None = None) -> list[str]:
    """Returns the ids of the requests that have been in their state for longer than [retention] keeps them."""
    at = now or datetime.now(UTC)
    found: list[str] = []
    for state in RequestState:
        days = settings.retention.days(state)
        if days is not None:
            found += store.unmoved(state, before=at - timedelta(days=days))
    return found


def purge(
    settings: Settings, store: RequestStore, blobs: BlobStore, request_id: str, *, dry_run: bool = False
) -> Certificate:
    """Purges one request; with `dry_run`, only says what would go.

    Raises NotFoundError, and TransitionError for a state that is not final, or while an open batch trains on it.
    """
    record = store.get(request_id)
    lifecycle.check(request_id, record.state, RequestState.PURGED)
    nights = list(_nights(settings, record))
    busy = [night.id for night in nights if _is_open(store, night.id)]
    if busy:
        raise TransitionError(f"request {request_id} is trained on in the open batch {busy[0]}", hint="end it first")
    own = {*record.request.blobs}
    shared = needed_by_others(store, request_id, own)
    certificate = Certificate(request_id, record.state, len(own - shared), len(shared), tuple(n.id for n in nights))
    if dry_run:
        return certificate
    for blob in sorted(own - shared):
        blobs.delete(blob)
    for night in nights:
        _forget(night, record.request, store, blobs)
    shutil.rmtree(settings.home / "cache" / "evaluation", ignore_errors=True)  # it is computed again
    store.purge(request_id, str(certificate))
    return certificate


def purge_due(settings: Settings, store: RequestStore, blobs: BlobStore) -> None:
    """Purges what is due, at the end of a night: a request that cannot be purged is logged, and fails nothing."""
    done = 0
    for request_id in due(settings, store):
        try:
            purge(settings, store, blobs, request_id)
            done += 1
        except ExpungeError as error:
            get_logger("batch").warning("a request was not purged", request=request_id, why=error.message)
    if done:
        store.database.scrub()
        get_logger("batch").info("purged", requests=done)


def drop_pictures(store: RequestStore, blobs: BlobStore, record: RequestRecord) -> int:
    """Deletes the pictures of a withdrawn request that no other request needs; returns how many."""
    own = {*record.request.blobs}
    gone = own - needed_by_others(store, record.request.id, own)
    for blob in sorted(gone):
        blobs.delete(blob)
    return len(gone)


def replayable(store: RequestStore, requests: Iterable[str]) -> list[RemovalRequest]:
    """Returns the requests of a ledger that can be trained on again: a purged one has no pictures any more."""
    records = [store.get(request) for request in requests]
    lost = [record.request.id for record in records if record.state is RequestState.PURGED]
    if lost:
        get_logger("batch").warning("purged removals cannot be replayed and leave the ledger", requests=lost)
    return [record.request for record in records if record.state is not RequestState.PURGED]


def _nights(settings: Settings, record: RequestRecord) -> Iterator[NightFolder]:
    """Yields the nights, and the later verifications, that had to do with a request."""
    batches = {event.batch for event in record.history}
    for path in sorted(settings.runs.glob("*/")):
        night = NightFolder(path)
        planned = night.plan
        jobs = [job for folder in night.jobs if (job := folder.job.read()) is not None]
        if night.id in batches or _names((*jobs, *(planned.jobs if planned else ())), record.request.id):
            yield night


def _is_open(store: RequestStore, batch: str) -> bool:
    try:
        return store.batch(batch).closed is None
    except NotFoundError:  # a verification before a promotion
        return False


def _names(jobs: Iterable[UnlearnJob], request_id: str) -> bool:
    return any(request.id == request_id for job in jobs for request in job.everything)


def _forget(night: NightFolder, request: RemovalRequest, store: RequestStore, blobs: BlobStore) -> None:
    """Takes a request out of what a night has left."""
    report = store.drop_report(night.id)
    if report is not None:
        blobs.delete(report)

    def blank(job: UnlearnJob) -> UnlearnJob:
        def without(requests: tuple[RemovalRequest, ...]) -> tuple[RemovalRequest, ...]:
            return tuple(store.vault.tombstone(each) if each.id == request.id else each for each in requests)

        return job.model_copy(update={"requests": without(job.requests), "ledger": without(job.ledger)})

    night.redact(blank)
    for folder in night.jobs:
        job = folder.job.read()
        if job is not None and _names([job], request.id):
            _forget_job(folder, request.id, blobs, blank)


def _forget_job(
    folder: JobFolder, request_id: str, blobs: BlobStore, blank: Callable[[UnlearnJob], UnlearnJob]
) -> None:
    folder.job.write(blank(folder.job.expect()))
    prepared = folder.prepared.read()
    if prepared is not None:
        for blob in (prepared.forget, prepared.conditioning, *prepared.surrogates.get(request_id, ())):
            blobs.delete(blob)
        surrogates = {id: made for id, made in prepared.surrogates.items() if id != request_id}
        folder.prepared.write(prepared.model_copy(update={"surrogates": surrogates}))
    evidence = folder.evidence.read()
    if evidence is not None and request_id in evidence.pictures:
        blobs.delete(evidence.pictures[request_id])
        pictures = {id: blob for id, blob in evidence.pictures.items() if id != request_id}
        folder.evidence.write(evidence.model_copy(update={"pictures": pictures}))
