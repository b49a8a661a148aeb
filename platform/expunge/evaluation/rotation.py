"""Which earlier removals a night verifies again: a rotating sample, so that none goes unverified for long.

Each night trains new weights, so a removal that tonight's sample leaves out is not proven on them: it was last proven
on an earlier champion. The rotation bounds how long that can go on.

What counts as a night here is a promotion: `night` is the champion's number, 1 for a model's first. A night that
promotes nothing changes neither the champion nor when a request was last verified on one. The record travels in the
champion's own ledger, so a rollback takes it back as well, and a lost record makes everything due.
"""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence


def nights_until_verified(share: float) -> int:
    """Return the largest number of promotions from one verification of a request to the next; share in (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], not {share}")
    return _ceil(1 / share)


def quota(share: float, ledger: int) -> int:
    """Return how many of a ledger's requests are verified at each promotion, at least; share in (0, 1]."""
    return _ceil(share * ledger)


def due_for_verification(
    ledger: Sequence[str],
    verified: Mapping[str, int],
    *,
    night: int,
    batch: str,
    share: float,
    everything: bool = False,
) -> tuple[str, ...]:
    """Return the requests of `ledger` to verify on tonight's weights, in the ledger's order.

    verified: the number of the champion that each was last verified on, if any. night: the number that tonight's
    version would have as champion. batch: decides among requests that were verified on the same champion.

    They are at least `share` of the ledger, those verified longest ago first. Whatever would otherwise wait more than
    `nights_until_verified(share)` promotions is always among them, and so is what has no record or one from the future,
    as a restored backup may leave. Everything is, if `everything`: before a promotion that a person makes.
    """
    patience, least = nights_until_verified(share), quota(share, len(ledger))
    if everything:
        return tuple(ledger)

    def last(request: str) -> int:
        number = verified.get(request, 0)
        return number if 0 < number < night else night - patience

    def lot(request: str) -> bytes:
        return hashlib.sha256(f"{batch}/{request}".encode()).digest()

    order = sorted(ledger, key=lambda request: (last(request), lot(request)))
    overdue = sum(night - last(request) >= patience for request in ledger)
    due = {*order[: max(least, overdue)]}
    return tuple(request for request in ledger if request in due)


def record_verified(
    ledger: Collection[str], verified: Mapping[str, int], *, night: int, proven: Collection[str]
) -> dict[str, int]:
    """Return the record of tonight's version with this `ledger`; it was shown to remove the `proven` ones."""
    return {request: night for request in ledger if request in proven} | {
        request: verified[request] for request in ledger if request not in proven and request in verified
    }


def detection_time(share: float) -> str:
    """Say what the rotation promises, for the evidence and the report."""
    nights = nights_until_verified(share)
    if nights == 1:
        return "Every earlier removal is verified every night."
    return (
        f"Every night verifies a rotating {share:.0%} of the earlier removals: one that resurfaces is noticed within "
        f"{nights} promotions, so at most {nights - 1} champions can carry it unnoticed."
    )


def _ceil(x: float) -> int:
    """Round up, but not for the sake of a rounding error: 0.1 * 30 is 3."""
    return math.ceil(round(x, 9))
