"""Stores a request's row together with its pictures: whatever happens, both are there afterwards, or neither."""

from collections.abc import Mapping
from contextlib import suppress

from expunge.errors import ExpungeError
from expunge.requests.blobs import BlobStore
from expunge.requests.inventory import names
from expunge.requests.records import RequestRecord
from expunge.requests.store import RequestStore
from expunge.types import RemovalRequest


def store_together(
    request: RemovalRequest, pictures: Mapping[str, bytes], *, store: RequestStore, blobs: BlobStore
) -> tuple[RequestRecord, bool]:
    """Store the pictures (PNG by blob id), then the row; if the row is refused, its new pictures are deleted.

    As `RequestStore.add` otherwise. Raises InputError, StorageError and UnavailableError of the stores.
    """
    brought = {blob: png for blob, png in pictures.items() if not blobs.has(blob)}
    try:
        for png in pictures.values():
            blobs.put(png)
        stored = store.add(request)
    except BaseException:
        _take_back(brought, store, blobs)
        raise
    # A refused request with the same picture may have deleted it before it could see this row.
    for blob, png in pictures.items():
        if not blobs.has(blob):
            blobs.put(png)
    return stored


def _take_back(brought: Mapping[str, bytes], store: RequestStore, blobs: BlobStore) -> None:
    """Delete what no row names. If the database cannot be asked, it stays: an orphan is better than a gap."""
    for blob, png in brought.items():
        with suppress(ExpungeError):
            if not names(store, blob):
                blobs.delete(blob)
                if names(store, blob):  # accepted in between
                    blobs.put(png)
