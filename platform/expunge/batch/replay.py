"""Replay: what a model's champion removes is unlearned from another base model, in one night of its own.

The night plans, trains, evaluates and registers as every night does; its version becomes the candidate. No request
changes its state, because the champion goes on being served until a person promotes the new version.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from expunge.batch.driver import drive
from expunge.batch.plan import plan_night
from expunge.batch.registering import all_open
from expunge.errors import InputError, NotFoundError
from expunge.families import source_digest
from expunge.registry.artifacts import read_ledger
from expunge.registry.tracking import Tracker
from expunge.registry.versions import champion
from expunge.requests.blobs import BlobStore, open_blobs
from expunge.requests.home import check_home
from expunge.requests.store import RequestStore, open_store
from expunge.runs.locks import PATIENCE_S
from expunge.runs.night import REPLAY
from expunge.runs.outcomes import NightOutcome, NightPlan
from expunge.settings import Settings
from expunge.types import ModelVersion, RemovalBatch, RemovalRequest, RequestState

GONE = {
    RequestState.PURGED: "its pictures were purged",
    RequestState.WITHDRAWN: "it was withdrawn, and its pictures deleted",
}


@dataclass(frozen=True)
class Replay:
    """The removals of a champion, and what of them can be repeated on the base model in the settings."""

    batch: str
    """The id of its batch: the same for the same removals, base model and settings, so that a second start goes on."""
    champion: ModelVersion
    requests: tuple[RemovalRequest, ...]
    refused: dict[str, str]
    """Request id: why it cannot be replayed."""


def look(settings: Settings, store: RequestStore, blobs: BlobStore, tracker: Tracker, model: str) -> Replay:
    """Find out what can be replayed; changes nothing.

    Raises NotFoundError if the model has no champion, InputError if nothing can be replayed or the base model is not
    usable, and StorageError if the champion's ledger is damaged.
    """
    base = source_digest(settings.model(model))
    current = champion(tracker, model)
    if current is None:
        raise NotFoundError(f"{model} has no champion, so there is nothing to replay", hint="run `expunge night`")
    requests, refused = _sorted_out(store, blobs, read_ledger(tracker, current).requests)
    if not requests:
        why = next((f"{id}: {said}" for id, said in refused.items()), "its ledger is empty")
        raise InputError(f"{current.uri} has no removal that can be replayed ({why})", hint="see `expunge ledger`")
    return Replay(_batch_id(settings, current, base, requests), current, requests, refused)


def run_replay(settings: Settings, model: str, home: str | None = None) -> NightOutcome:
    """Run or continue a replay on the Ray that this process is connected to; one that has ended is not run again.

    settings: with the base model as the source of `model`. home: as `run_night` takes it. Raises as `look` and
    `run_night` do.
    """
    if home is not None:
        check_home(settings, home)
    store, tracker = open_store(settings, patience=PATIENCE_S), Tracker(settings.tracking)
    found = look(settings, store, open_blobs(settings), tracker, model)
    store.make_batch(found.batch)
    batch = RemovalBatch(id=found.batch, created=store.batch(found.batch).created, requests=())

    def plan(batch: RemovalBatch) -> NightPlan:
        full = batch.model_copy(update={"requests": found.requests})
        planned = plan_night(full, settings, lambda model: (found.champion, ()), replay=True)
        if not planned.jobs:
            raise InputError(next(iter(planned.refused.values())), hint="name another --source")
        return planned.model_copy(update={"refused": found.refused})

    return drive(settings, store, tracker, batch, plan)


def _sorted_out(
    store: RequestStore, blobs: BlobStore, ids: Iterable[str]
) -> tuple[tuple[RemovalRequest, ...], dict[str, str]]:
    """Return the requests that can be replayed, and of the others why not."""
    requests: list[RemovalRequest] = []
    refused: dict[str, str] = {}
    for id in ids:
        try:
            record = store.get(id)
        except NotFoundError:
            refused[id] = "the database does not know it"
            continue
        if record.state in GONE:
            refused[id] = GONE[record.state]
        elif not all_open(blobs, *record.request.blobs):
            refused[id] = "a picture of it is missing or damaged"
        else:
            requests.append(record.request)
    return tuple(requests), refused


def _batch_id(settings: Settings, current: ModelVersion, base: str, requests: Iterable[RemovalRequest]) -> str:
    sections = (settings.training_for(current.name), settings.evaluation, settings.gate_for(current.name))
    content = (current.uri, base, *(request.id for request in requests), *(s.model_dump_json() for s in sections))
    return f"{REPLAY}{hashlib.sha256(' '.join(content).encode()).hexdigest()[:12]}"
