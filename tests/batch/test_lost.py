"""Removals that the store calls done and that no champion holds, on a real store and a real registry."""

from collections.abc import Callable
from pathlib import Path

import pytest

from expunge import doctor
from expunge.batch import driver
from expunge.batch.lost import WHY, lost_removals
from expunge.errors import ExpungeError
from expunge.files import write_atomically
from expunge.registry.tracking import Tracker
from expunge.registry.uploading import register
from expunge.registry.versions import promote
from expunge.requests.store import RequestStore
from expunge.settings import Settings
from expunge.types import (
    Evidence,
    Hotfix,
    Ledger,
    ModelVersion,
    RemovalBatch,
    RemovalRequest,
    RequestState,
    TrainingSettings,
    UnlearnJob,
)

Ask = Callable[..., RemovalRequest]
Judge = Callable[..., Evidence]


@pytest.fixture
def tracker(settings: Settings) -> Tracker:
    return Tracker(settings.tracking)


@pytest.fixture
def removed(
    store: RequestStore, tracker: Tracker, ask: Ask, judge: Judge, tmp_path: Path
) -> tuple[RemovalRequest, ModelVersion]:
    """One request that was removed by a champion."""
    request = ask("old")
    store.add(request)
    batch = store.drain(None)
    store.transition(request.id, RequestState.REMOVED, batch=batch.id)
    store.close_batch(batch.id)
    job = UnlearnJob(
        batch=batch.id,
        model="flags",
        source="testbed:flags",
        resolution=(32, 48),
        requests=(request,),
        training=TrainingSettings(),
    )
    folder = tmp_path / "hotfix"
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(b"weights")
    version = register(
        tracker,
        job=job,
        hotfix=Hotfix(job=job.id, kind="full", path=folder, steps=1, digest="0"),
        evidence=judge(job),
        run_id=tracker.ensure_run("flags", job.id, params={}, tags={}),
        batch_id=batch.id,
        ledger=Ledger(model="flags", version=None, requests=(request.id,)),
        key=b"k" * 32,
    )
    return request, promote(tracker, version)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the requests that the last driver was about to plan a night for, when it was killed."""
    ids: list[str] = []

    def plan_night(batch: RemovalBatch, *others: object) -> None:
        ids[:] = [request.id for request in batch.requests]
        raise KeyboardInterrupt("killed")

    monkeypatch.setattr(driver, "plan_night", plan_night)
    return ids


Harm = Callable[[Tracker, Settings], None]


def _deleted(tracker: Tracker, settings: Settings) -> None:
    tracker.client.delete_model_version("flags", "1")


def _without_alias(tracker: Tracker, settings: Settings) -> None:
    tracker.client.delete_registered_model_alias("flags", "champion")


def test_what_the_champion_holds_is_not_lost(
    store: RequestStore, tracker: Tracker, removed: tuple[RemovalRequest, ModelVersion]
) -> None:
    assert lost_removals(store, tracker) == {}


@pytest.mark.parametrize("harm", [_deleted, _without_alias])
def test_a_champion_that_is_gone_takes_its_removals_along(
    store: RequestStore,
    tracker: Tracker,
    settings: Settings,
    removed: tuple[RemovalRequest, ModelVersion],
    harm: Harm,
    ask: Ask,
    planned: list[str],
) -> None:
    request, _ = removed
    harm(tracker, settings)
    assert lost_removals(store, tracker) == {"flags": [request.id]}
    assert lost_removals(store, tracker, ["faces"]) == {}
    store.add(ask("new", model="faces"))
    batch = store.drain(None)
    for _ in range(2):  # a second start finds nothing more that is lost
        with pytest.raises(KeyboardInterrupt, match="killed"):
            driver.run_night(settings, batch.id)
        assert planned == ["req-new", request.id]
        record = store.get(request.id)
        assert (record.state, record.attempts) == (RequestState.BATCHED, 0)
        assert [event.detail for event in record.history].count(WHY) == 1


def test_doctor_shows_the_difference(
    store: RequestStore, tracker: Tracker, settings: Settings, removed: tuple[RemovalRequest, ModelVersion]
) -> None:
    request, _ = removed
    assert doctor.LOOKS["removals"](settings) == "1, all held by their champions"
    _deleted(tracker, settings)
    with pytest.raises(ExpungeError, match=rf"1 removed requests that no champion holds \(flags: {request.id}\): run"):
        doctor.LOOKS["removals"](settings)


def test_another_registry_holds_nothing(
    settings: Settings, removed: tuple[RemovalRequest, ModelVersion], tmp_path: Path, planned: list[str]
) -> None:
    """As where MLflow's store was lost and made anew."""
    request, _ = removed
    empty = settings.model_copy(update={"tracking_uri": f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"})
    with pytest.raises(KeyboardInterrupt, match="killed"):
        driver.run_night(empty, "made-for-them")
    assert planned == [request.id]


@pytest.mark.usefixtures("removed")
def test_a_plan_that_was_made_is_not_changed(
    store: RequestStore, tracker: Tracker, settings: Settings, ask: Ask, planned: list[str]
) -> None:
    _deleted(tracker, settings)
    store.add(ask("new"))
    batch = store.drain(None)
    write_atomically(settings.runs / batch.id / "plan.json", "{}")  # there, and damaged: it is made again
    with pytest.raises(KeyboardInterrupt, match="killed"):
        driver.run_night(settings, batch.id)
    assert planned == ["req-new"]
