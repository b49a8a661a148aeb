"""A version whose evidence does not cover its ledger is evaluated again before a person promotes it: a real one.

The hotfix is the shipped faces model as it is, so it removes nothing, whatever its ledger says.
"""

import tomllib
from pathlib import Path

import pytest

from expunge.families import load_model, source_digest
from expunge.pixels import to_pictures, to_png
from expunge.registry import uploading, versions
from expunge.registry.tracking import Tracker
from expunge.requests.blobs import open_blobs
from expunge.requests.imaging import normalise
from expunge.requests.store import RequestStore
from expunge.settings import Settings, load_settings
from expunge.testbed import faces
from expunge.types import Hotfix, Ledger, RemovalRequest, RequestState, UnlearnJob
from expunge.unlearning.adapter import export
from tests import evidence as made
from tests.cli.conftest import Command
from tests.gates import OPEN_GATE

FACE = "face"
QUICK = {
    "EVALUATION__LEVELS": "[0.4]",
    "EVALUATION__SEEDS": "8",
    "EVALUATION__UNSEEN_PICTURES": "16",
    "EVALUATION__GENERATION_SAMPLES": "16",
    "EVALUATION__INTEGRITY_SAMPLES": "16",
    "EVALUATION__SAMPLING_STEPS": "4",
    "EVALUATION__ROBUSTNESS": "off",
    "TRAINING__RETAIN_SIZE": "8",
}


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in QUICK.items():
        monkeypatch.setenv(f"EXPUNGE_{name}", value)
    return load_settings()


@pytest.fixture
def tracker(settings: Settings, empty_registry: Tracker) -> Tracker:
    return empty_registry


@pytest.fixture
def version(settings: Settings, store: RequestStore, tracker: Tracker, tmp_path: Path) -> str:
    """A champion of one removal, and a candidate whose night did not verify it; returns the candidate's number."""
    blobs = open_blobs(settings)
    people = faces.images().expand(-1, 3, -1, -1)
    target, surrogate = (
        blobs.put(normalise(to_png(to_pictures(people[n][None])[0]), field="picture", max_pixels=10_000))
        for n in (3, 20)
    )
    request = RemovalRequest(
        id=FACE, model="faces", images=(target,), surrogates=(surrogate,), external_id="ticket-face"
    )
    store.add(request)
    batch = store.drain("night-1").id
    store.transition(FACE, RequestState.REMOVED, batch=batch)
    store.close_batch(batch)
    for seed in (0, 1):
        job = UnlearnJob(
            batch=batch,
            model="faces",
            source="testbed:faces",
            base=source_digest(settings.model("faces")),
            resolution=(24, 24),
            requests=(),
            ledger=(request,),
            training=settings.training_for("faces").model_copy(update={"seed": seed}),
        )
        model = load_model(settings.model("faces"), (24, 24))
        hotfix: Hotfix = export(model, job.training, tmp_path / f"hotfix-{seed}", job.id, steps=1)
        made_version = uploading.register(
            tracker,
            job=job,
            hotfix=hotfix,
            evidence=made.evidence(job.id).model_copy(update={"unverified": (FACE,)}),
            run_id=tracker.ensure_run("faces", job.id, params={}, tags={}),
            batch_id=batch,
            ledger=Ledger(model="faces", version=None, requests=(FACE,), night=seed + 1, verified={FACE: 1}),
            key=blobs.derive("ledger"),
        )
        if seed == 0:
            versions.promote(tracker, made_version)
    return "2"


def champion(tracker: Tracker) -> str:
    found = versions.champion(tracker, "faces")
    assert found is not None
    return found.version


def test_a_ledger_that_promises_too_much_is_found_out(
    command: Command, store: RequestStore, tracker: Tracker, version: str
) -> None:
    ended = command("promote", "faces", version, "--yes")
    assert ended.code == 3, ended.err
    assert "models:/faces/2 does not pass: face failed" in ended.err
    assert (champion(tracker), store.get(FACE).state) == ("1", RequestState.REMOVED)
    accepting = ("promote", "faces", version, "--yes", "--accept-failed")
    ended = command(*accepting)
    assert ended.code == 3
    assert "would bring back 1 removal: face" in ended.err
    assert (champion(tracker), store.get(FACE).state) == ("1", RequestState.REMOVED)
    ended = command(*accepting, "--accept-resurfacing", "--json")
    assert ended.code == 0, ended.err
    assert ended.json["resurfaced"] == [FACE]
    assert "face failed" in ended.json["accepted_failures"]
    assert (champion(tracker), store.get(FACE).state) == ("2", RequestState.ACCEPTED)
    assert "who accepted: face failed" in " ".join(event.detail for event in store.get(FACE).history)
    assert command("ledger", "faces", "--json").json["removals"] == []
    assert command("ledger", "faces@1", "--json").json["removals"][0]["request"] == FACE


def test_what_is_verified_again_is_recorded_with_the_version(
    command: Command, store: RequestStore, tracker: Tracker, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a gate that is wide open, as every verdict then says."""
    for name, value in tomllib.loads(OPEN_GATE)["gate"].items():
        monkeypatch.setenv(f"EXPUNGE_GATE__{name.upper()}", str(value))
    ended = command("promote", "faces", version, "--yes", "--json")
    assert ended.code == 0, ended.err
    assert (ended.json["champion"], ended.json["resurfaced"]) == ("2", [])
    assert store.get(FACE).state is RequestState.REMOVED
    found = command("ledger", "faces", "--json").json
    assert "max_excess 1e+09 instead of" in " ".join(found["loosened"])
    assert found["promotion"] == 2
    assert found["removals"] == [{"request": FACE, "verdict": "passed", "since": "1", "verified": 2}]
