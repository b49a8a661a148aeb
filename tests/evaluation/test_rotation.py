"""Which earlier removals a night verifies again."""

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expunge.evaluation.rotation import (
    detection_time,
    due_for_verification,
    nights_until_verified,
    record_verified,
)

IDS = [f"request-{i}" for i in range(40)]


def walk(nights: int, share: float, *, seed: int = 0) -> dict[str, list[int]]:
    """The champions that each request was verified on, while the ledger grows and shrinks at random."""
    chance, ledger, verified = random.Random(seed), IDS[:8], {}
    history: dict[str, list[int]] = {}
    fresh = iter(IDS[8:])
    for night in range(1, nights + 1):
        due = due_for_verification(ledger, verified, night=night, batch=f"night-{night}", share=share)
        new = [request for request, _ in zip(fresh, range(chance.randrange(3)), strict=False)]
        gone = chance.sample(ledger, chance.randrange(3)) if len(ledger) > 6 else []
        ledger = [request for request in [*ledger, *new] if request not in gone]
        verified = record_verified(ledger, verified, night=night, proven={*due, *new})
        for request in ledger:
            if verified.get(request) == night:
                history.setdefault(request, []).append(night)
        waited = {request: night - verified[request] for request in ledger}
        assert max(waited.values()) < nights_until_verified(share)
    return history


@given(st.integers(0, 1000), st.sampled_from([0.1, 0.25, 0.3, 0.5, 1.0]))
def test_no_request_waits_longer_than_promised_however_the_ledger_changes(seed: int, share: float) -> None:
    history = walk(16, share, seed=seed)
    longest = max((b - a for nights in history.values() for a, b in pairwise(nights)), default=0)
    assert longest <= math.ceil(1 / share)


def test_a_steady_ledger_is_verified_in_equal_shares() -> None:
    verified = {request: 1 for request in IDS}
    sizes = []
    for night in range(2, 12):
        due = due_for_verification(IDS, verified, night=night, batch=f"night-{night}", share=0.25)
        verified = record_verified(IDS, verified, night=night, proven=due)
        sizes.append(len(due))
    assert sizes == [10] * 10


def test_the_sample_is_the_same_when_a_night_is_continued_and_another_on_another_night() -> None:
    verified = {request: 1 for request in IDS}
    first, again, other = (
        due_for_verification(IDS, verified, night=2, batch=batch, share=0.25) for batch in ("a", "a", "b")
    )
    assert first == again != other


def test_a_night_that_promoted_nothing_does_not_count() -> None:
    """Its number comes again, and those verified longest ago are still due."""
    verified = {request: 1 + (i % 4) for i, request in enumerate(IDS)}
    for batch in ("failed", "the one after"):
        due = due_for_verification(IDS, verified, night=5, batch=batch, share=0.25)
        assert due == tuple(request for request in IDS if verified[request] == 1)


@pytest.mark.parametrize("record", [{}, {request: 9 for request in IDS}], ids=["lost", "from the future"])
def test_everything_is_due_where_the_record_cannot_be_relied_on(record: dict[str, int]) -> None:
    assert due_for_verification(IDS, record, night=3, batch="b", share=0.25) == tuple(IDS)


def test_everything_is_due_before_a_person_promotes() -> None:
    verified = {request: 2 for request in IDS}
    assert due_for_verification(IDS, verified, night=3, batch="b", share=0.1, everything=True) == tuple(IDS)


def test_an_empty_ledger_has_nothing_due() -> None:
    assert due_for_verification([], {}, night=1, batch="b", share=0.25) == ()


def test_what_was_not_verified_keeps_its_record_and_what_left_the_ledger_loses_it() -> None:
    record = record_verified(["old", "new"], {"old": 3, "gone": 2}, night=5, proven={"new"})
    assert record == {"old": 3, "new": 5}


@pytest.mark.parametrize(("share", "nights"), [(1, 1), (0.5, 2), (0.25, 4), (0.3, 4), (0.1, 10), (0.2, 5)])
def test_the_detection_time_is_stated(share: float, nights: int) -> None:
    assert nights_until_verified(share) == nights
    assert (
        ("every night." in detection_time(share)) if nights == 1 else (f"{nights} promotions" in detection_time(share))
    )


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="share"):
        nights_until_verified(0)
