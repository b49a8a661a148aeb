"""Reads every request and every blob: checks whether pictures are lost, and whether some are left over."""

from contextlib import closing
from typing import TYPE_CHECKING

from expunge.doctor.check import Check, some
from expunge.settings import Settings

if TYPE_CHECKING:
    from expunge.requests.inventory import Inventory


def pictures(settings: Settings) -> list[Check]:
    """Raises StorageError and UnavailableError where the store or the blobs do not open."""
    from expunge.requests.blobs import open_blobs
    from expunge.requests.inventory import take_inventory
    from expunge.requests.store import open_store

    blobs = open_blobs(settings)
    with closing(open_store(settings)) as store:
        found = take_inventory(store, blobs, settings.runs)
    return [_lost(found), _left_over(found)]


def _lost(found: "Inventory") -> Check:
    if not found.lacking:
        return Check("pictures", True, f"every picture of {found.requests:,} requests is there and opens")
    lost = {blob for blobs in found.lacking.values() for blob in blobs}
    which = some(found.lacking)
    what = f"{len(found.lacking):,} of {found.requests:,} requests lack pictures ({len(lost & set(found.damaged)):,} "
    what += f"damaged, {len(lost - set(found.damaged)):,} gone): {which}"
    return Check("pictures", False, what, "submit these requests again, each as it was, or restore a backup")


def _left_over(found: "Inventory") -> Check:
    """A note: a blob that nobody needs does no harm, but it may be the picture of a person."""
    lost = {blob for blobs in found.lacking.values() for blob in blobs}
    damaged = [blob for blob in found.damaged if blob not in lost]
    said = [f"{found.blobs:,} blobs"]
    if found.orphans:
        what = f"{len(found.orphans):,} that no request, report or night names: {some(found.orphans)}"
        said.append(f"{what}. They may be deleted while no submit is running, and no night from another home")
    if damaged:
        what = f"{len(damaged):,} damaged that no request needs: {some(damaged)}"
        said.append(f"{what}. A night makes its own again; a damaged report is lost")
    return Check("blobs at rest", True, "; ".join(said), required=False)
