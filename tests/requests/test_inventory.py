"""Rows and blobs are compared: what lacks its pictures is named, and what nobody needs."""

from pathlib import Path

import pytest

from expunge.requests.blobs import BlobStore
from expunge.requests.inventory import Inventory, take_inventory
from expunge.requests.store import RequestStore
from expunge.types import RequestState
from tests.requests.conftest import Ask


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "home" / "runs"


def look(store: RequestStore, blobs: BlobStore, runs: Path) -> Inventory:
    return take_inventory(store, blobs, runs)


def test_all_agrees(store: RequestStore, blobs: BlobStore, ask: Ask, runs: Path) -> None:
    assert look(store, blobs, runs) == Inventory(0, 0, {}, (), ())
    image, surrogate, mask, report, tensor, grid = (blobs.put(name.encode()) for name in "isrtgm")
    store.add(ask("a", images=[image], surrogates=[surrogate]))
    store.add(ask("b", images=[image], edit={"editor": "blend", "mask": mask}))
    store.drain("night-1")
    store.set_report("night-1", report)
    (runs / "night-1" / "job").mkdir(parents=True)
    (runs / "night-1" / "job" / "prepared.json").write_text(f'{{"forget": "{tensor}"}}')
    store.transition("req-a", RequestState.REMOVED, evidence={"picture": grid})
    assert look(store, blobs, runs) == Inventory(2, 6, {}, (), ())


def test_orphans_are_what_nobody_names(store: RequestStore, blobs: BlobStore, ask: Ask, runs: Path) -> None:
    mine, left = blobs.put(b"mine"), blobs.put(b"left behind")
    store.add(ask("a", images=[mine]))
    found = look(store, blobs, runs)
    assert (found.orphans, found.lacking) == ((left,), {})
    assert blobs.has(left), "looking changes nothing"


@pytest.mark.parametrize("part", ["images", "surrogates", "mask"])
def test_gaps_name_the_request_and_the_blob(
    store: RequestStore, blobs: BlobStore, ask: Ask, runs: Path, tmp_path: Path, part: str
) -> None:
    there, bad = blobs.put(b"there"), blobs.put(b"bad")
    fields: dict[str, object] = {"images": [there]}
    fields |= {"edit": {"editor": "blend", "mask": bad}} if part == "mask" else {part: [bad]}
    store.add(ask("a", **fields))
    store.add(ask("b", images=[there]))
    (tmp_path / "blobs" / bad[:2] / bad).write_bytes(b"EXB1 and nothing that opens")
    found = look(store, blobs, runs)
    assert (found.lacking, found.damaged) == ({"req-a": (bad,)}, (bad,))
    blobs.delete(bad)
    found = look(store, blobs, runs)
    assert (found.lacking, found.damaged) == ({"req-a": (bad,)}, ())


@pytest.mark.parametrize("state", sorted({*RequestState} - {RequestState.PURGED}))
def test_only_a_withdrawn_request_may_lack_pictures(
    store: RequestStore, blobs: BlobStore, ask: Ask, runs: Path, state: RequestState
) -> None:
    store.add(ask("a", images=["0" * 64]))
    if state not in (RequestState.ACCEPTED, RequestState.WITHDRAWN):
        store.transition("req-a", RequestState.BATCHED)
    store.transition("req-a", state)
    assert bool(look(store, blobs, runs).lacking) is (state is not RequestState.WITHDRAWN)


def test_a_blob_of_a_withdrawn_request_is_no_orphan(
    store: RequestStore, blobs: BlobStore, ask: Ask, runs: Path
) -> None:
    store.add(ask("a", images=[blobs.put(b"mine")]))
    store.transition("req-a", RequestState.WITHDRAWN)
    assert look(store, blobs, runs).orphans == ()


def test_a_damaged_blob_that_no_request_needs_is_no_gap(
    store: RequestStore, blobs: BlobStore, runs: Path, tmp_path: Path
) -> None:
    blob = blobs.put(b"a tensor")
    (tmp_path / "blobs" / blob[:2] / blob).write_bytes(b"?")
    found = look(store, blobs, runs)
    assert (found.lacking, found.damaged, found.orphans) == ({}, (blob,), (blob,))
