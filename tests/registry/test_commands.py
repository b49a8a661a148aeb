"""The commands that read and move versions, on a registry and a request store as nights leave them."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from expunge.registry import versions
from expunge.registry.tracking import Tracker
from expunge.requests.blobs import open_blobs
from expunge.requests.store import RequestStore, open_store
from expunge.settings import TrainingSettings, load_settings
from expunge.types import Hotfix, Ledger, ModelVersion, RemovalRequest, RequestState, UnlearnJob
from tests import evidence as made
from tests.cli.conftest import Command

ACCEPTED, REMOVED = RequestState.ACCEPTED, RequestState.REMOVED
FAILED = 2.0
"""A bound of the excess that is far over the threshold."""


@pytest.fixture
def store() -> Iterator[RequestStore]:
    opened = open_store(load_settings())
    yield opened
    opened.close()


@pytest.fixture
def tracker(migrated: Path) -> Tracker:
    """The tracker of the test's own home."""
    tracker = Tracker(load_settings().tracking)
    shutil.copy(migrated, load_settings().home / "mlflow" / "mlflow.db")
    return tracker


Night = Callable[..., ModelVersion]


@pytest.fixture
def night(store: RequestStore, tracker: Tracker, tmp_path: Path) -> Night:
    """Leave what a night does: its requests judged, a version of all that passed, and by default a new champion."""

    def leave(number: int, *, new: str, failed: str = "", promoted: bool = True, keep: str = "all") -> ModelVersion:
        earlier = versions.ledger(tracker, "flags")
        held = [id for id in earlier.requests if keep == "all" or id in keep.split()]
        asked = [request(id) for id in new.split()]
        for each in asked:
            store.add(each)
        batch = store.drain(f"night-{number}").id
        job = UnlearnJob(
            batch=batch,
            model="flags",
            source="testbed:flags",
            resolution=(32, 48),
            requests=tuple(asked),
            ledger=tuple(request(id) for id in held),
            training=TrainingSettings(seed=number),
        )
        judged = [made.judged(each.id, *([FAILED] if each.id in failed.split() else [])) for each in asked]
        evidence = made.evidence(job.id, *judged).model_copy(update={"unverified": tuple(held)})
        folder = tmp_path / f"hotfix-{number}"
        folder.mkdir()
        (folder / "pytorch_lora_weights.safetensors").write_bytes(job.id.encode())
        passed = [each.id for each in asked if each.id in evidence.passed]
        ledger = Ledger(
            model="flags",
            version=None,
            requests=(*held, *passed),
            night=earlier.night + 1,
            verified={**earlier.verified, **dict.fromkeys(passed, earlier.night + 1)},
        )
        version = versions.register(
            tracker,
            job=job,
            hotfix=Hotfix(job=job.id, kind="lora", path=folder, steps=3, digest="d" * 64),
            evidence=evidence,
            run_id=tracker.ensure_run("flags", job.id, params={}, tags={}),
            batch_id=batch,
            ledger=ledger,
            key=open_blobs(load_settings()).derive("ledger"),
        )
        for each in asked:
            done = promoted and each.id in passed
            store.transition(each.id, REMOVED if done else ACCEPTED, batch=batch, detail="measured", attempt=False)
        store.close_batch(batch)
        return versions.promote(tracker, version) if promoted else version

    return leave


def request(id: str) -> RemovalRequest:
    return RemovalRequest(
        id=id, model="flags", images=("0" * 64,), external_id=f"ticket-{id}", prompt="a personal prompt"
    )


def states(store: RequestStore) -> dict[str, RequestState]:
    return {record.request.id: record.state for record in store.list()}


def champion(tracker: Tracker) -> str | None:
    found = versions.champion(tracker, "flags")
    return found.version if found else None


def test_the_ledger_says_who_is_removed_how_it_was_judged_and_since_when(command: Command, night: Night) -> None:
    night(1, new="r-1")
    night(2, new="r-2 r-3", failed="r-3")
    ended = command("ledger", "flags", "--json")
    assert ended.code == 0, ended.err
    assert (ended.json["version"], ended.json["promotion"], ended.json["signed"]) == ("2", 2, True)
    assert [tuple(each.values()) for each in ended.json["removals"]] == [
        ("r-1", "not verified", "1", 1),
        ("r-2", "passed", "2", 2),
    ]
    printed = command("ledger", "flags@champion")
    assert "models:/flags/2 (candidate, champion) removes 2 requests" in printed.out
    assert "personal" not in printed.out + ended.out
    assert command("ledger", "flags@1").out.count("r-1") == 1


def test_two_versions_are_compared(command: Command, night: Night) -> None:
    night(1, new="r-1 r-2")
    night(2, new="r-3", keep="r-1")
    ended = command("ledger", "flags", "--against", "1", "--json")
    assert (ended.json["only_here"], ended.json["only_there"]) == (["r-3"], ["r-2"])
    assert (ended.json["version"], ended.json["against"]["version"]) == ("2", "1")
    printed = command("ledger", "flags@1", "--against", "@champion").out
    assert "both remove 1 request" in printed
    assert "only models:/flags/1 removes 1 request:\n  r-2\n" in printed


@pytest.mark.parametrize(("named", "code"), [("flags", 4), ("flags@7", 4), ("flags@no-such", 4), ("a/b@1", 2)])
def test_an_absent_version_has_no_ledger(command: Command, tracker: Tracker, named: str, code: int) -> None:
    assert command("ledger", named).code == code


def test_a_ledger_that_was_tampered_with_is_refused(command: Command, night: Night, tracker: Tracker) -> None:
    version = night(1, new="r-1 r-2")
    file = versions.download(tracker, version.uri) / "ledger.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), "requests": ["r-1"]}))
    ended = command("ledger", "flags")
    assert (ended.code, ended.out) == (6, "")
    assert "models:/flags/1: ledger.json does not match its digest" in ended.err
