"""Checks that requests and blobs agree: every request has its pictures, and somebody needs every blob.

Between a picture and its row lies a moment in which a submit may be killed or refused, and other requests may share
the picture. A picture that nobody needs is the harmless side to err on: it is found here, and never deleted by guess.
"""

import json
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select

from expunge.errors import NotFoundError
from expunge.requests.blobs import BlobStore
from expunge.requests.documents import Documents
from expunge.requests.store import RequestStore
from expunge.requests.tables import request_blobs, requests
from expunge.types import RequestState

NEEDED = frozenset(RequestState) - {RequestState.WITHDRAWN, RequestState.PURGED}
"""States of a request whose pictures some night needs, or may need again."""

_BLOB_ID = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


@dataclass(frozen=True)
class Inventory:
    """The result of reading every row and every blob. `lacking`: by request id, the blobs that are gone or damaged."""

    requests: int
    blobs: int
    lacking: dict[str, tuple[str, ...]]
    damaged: tuple[str, ...]
    """Blobs that do not open, whoever needs them."""
    orphans: tuple[str, ...]
    """Blobs that no request, no report and no file of a night names."""


def take_inventory(store: RequestStore, blobs: BlobStore, runs: Path) -> Inventory:
    """Open every blob; `runs` is the folder of the nights. Nothing is changed.

    What is being submitted meanwhile may look like an orphan. Raises StorageError, UnavailableError, OSError.
    """
    # The blobs first: each was stored before the row that names it.
    there = blobs.ids()
    needed: dict[str, tuple[str, ...]] = {}
    named: set[str] = set()
    count = 0
    for record in store.each():
        count += 1
        named |= {*record.request.blobs, *_ids(json.dumps(record.evidence).encode())}
        if record.state in NEEDED:
            needed[record.request.id] = record.request.blobs
    states = {blob: _state(blobs, blob) for blob in {*there, *(blob for ids in needed.values() for blob in ids)}}
    lacking = {id: tuple(blob for blob in ids if states[blob] != "ok") for id, ids in needed.items()}
    named |= {batch.report for batch in store.batches() if batch.report} | _named_in(runs, Documents(store.vault))
    return Inventory(
        requests=count,
        blobs=len(there),
        lacking={id: ids for id, ids in lacking.items() if ids},
        damaged=tuple(sorted(blob for blob, state in states.items() if state == "damaged")),
        orphans=tuple(blob for blob in there if blob not in named),
    )


def names(store: RequestStore, blob: str) -> bool:
    """True if a request names this blob."""
    with store.read() as connection:
        query = select(request_blobs.c.request).where(request_blobs.c.blob == store.vault.blob(blob)).limit(1)
        return connection.execute(query).one_or_none() is not None


def needed_by_others(store: RequestStore, request_id: str, blobs: Collection[str]) -> set[str]:
    """Returns those of the blobs that another request, in a state of NEEDED, names."""
    hashed = {store.vault.blob(blob): blob for blob in blobs}
    other = (requests.c.id != request_id) & requests.c.state.in_(NEEDED)
    query = (
        select(request_blobs.c.blob)
        .join(requests, requests.c.id == request_blobs.c.request)
        .where(request_blobs.c.blob.in_(hashed), other)
    )
    with store.read() as connection:
        return {hashed[blob] for blob in connection.execute(query).scalars()}


def _state(blobs: BlobStore, blob: str) -> str:
    try:
        return "ok" if blobs.opens(blob, blobs.sealed(blob)) else "damaged"
    except NotFoundError:
        return "gone"


def _named_in(runs: Path, documents: Documents) -> set[str]:
    """Finds every blob that a file of a night names: prepared tensors, surrogates, pictures of evidence."""
    found = set()
    for path in runs.rglob("*.json"):
        with suppress(FileNotFoundError):  # a night that goes on deletes its checkpoints
            found |= _ids(documents.open(path, path.read_bytes()) or b"")
    return found


def _ids(text: bytes) -> set[str]:
    """Finds everything that may be a blob's id: one too many is better than a false orphan."""
    return {found.decode() for found in _BLOB_ID.findall(text)}
