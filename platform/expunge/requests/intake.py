"""From what a person writes to an accepted request: checked, its pictures normalised and sealed, and then its row.

The pictures are stored first, so that an accepted row never lacks them; nothing of a refused request is stored.
"""

import unicodedata
from collections.abc import Callable
from datetime import date

from expunge.errors import InputError
from expunge.requests.assembly import Pictures, assemble
from expunge.requests.blobs import BlobStore
from expunge.requests.box import Size, same_shape
from expunge.requests.inventory import NEEDED
from expunge.requests.locations import Location
from expunge.requests.records import RequestRecord
from expunge.requests.store import RequestStore, check_same
from expunge.requests.submission import Submission, canonical
from expunge.requests.together import store_together
from expunge.requests.uploads import Uploads
from expunge.settings import Settings
from expunge.types import RemovalRequest

Check = Callable[[RemovalRequest, tuple[Size, ...]], None]
"""Called with a new request and the sizes of its images, before anything is stored. Raises InputError to refuse it."""


def accept(
    submission: Submission,
    *,
    settings: Settings,
    store: RequestStore,
    blobs: BlobStore,
    base: Location | Uploads,
    check: Check | None = None,
) -> tuple[RequestRecord, bool]:
    """Accepts one request, whose pictures lie beside `base` or in it. False: it was known, and that one is returned.

    Pictures of a known request that were lost or damaged are stored again.

    Raises InputError naming the field for anything wrong with it, StorageError and UnavailableError of the stores.
    """
    settings.model(submission.model)
    taken = Pictures(settings, base)
    request = assemble(submission, taken)
    known = None
    # Requests that were accepted before ids had one form are still found.
    for written in _spellings(submission.external_id or request.external_id):
        known = known or store.find(request.model, written)
    if known is not None:
        check_same(known, request.model_copy(update={"external_id": known.request.external_id}))
        # Pictures of a withdrawn request may have been purged, and nothing would purge them twice.
        if known.state in NEEDED:
            for png in taken.pictures.values():
                blobs.put(png)
        return known, False
    # Only for new requests: what was accepted once is not refused when its file is submitted again.
    _check_new(request, taken)
    if check is not None:
        check(request, tuple(taken.sizes))
    return store_together(request, taken.pictures, store=store, blobs=blobs)


def _spellings(external_id: str) -> tuple[str, ...]:
    one = canonical(external_id)
    return tuple(dict.fromkeys((one, external_id, unicodedata.normalize("NFD", one))))


def _check_new(request: RemovalRequest, taken: Pictures) -> None:
    """Raises InputError for mistakes that would otherwise only be found at night."""
    if request.due is not None and request.due < date.today():
        raise InputError(f"due: {request.due} is in the past", hint="give today or a later day, or leave it out")
    for i, (image, surrogate) in enumerate(zip(request.images, request.surrogates, strict=False)):
        if image == surrogate:
            raise InputError(
                f"surrogates[{i}] is the same picture as images[{i}]", hint="give the scene without the part to remove"
            )
    if taken.mask_size is None:
        return
    for i, size in enumerate(taken.sizes):
        if not same_shape(size, taken.mask_size):
            (width, height), (across, down) = taken.mask_size, size
            message = f"edit.mask: {width} x {height} pixels do not fit images[{i}], which has {across} x {down}"
            raise InputError(message, hint="give a mask of the image's size; images of other sizes need other requests")
    if taken.mask_is_empty:
        raise InputError("edit.mask: nothing is marked", hint="white is what may change")
