"""What a job was planned on, or has made, is gone: nothing is run for nothing, and no request is blamed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from expunge.batch import driver, job, training
from expunge.batch.faults import is_platforms
from expunge.batch.plan import plan_night
from expunge.batch.settle import settle
from expunge.errors import ExpungeError, NotFoundError, StorageError, UnavailableError
from expunge.files import file_digest, write_atomically
from expunge.preparation.prepare import prepare
from expunge.registry.tracking import Tracker
from expunge.registry.versions import champion as champion_of
from expunge.registry.versions import download, promote, register
from expunge.requests.blobs import BlobStore, open_blobs
from expunge.requests.home import remember
from expunge.requests.store import MAX_STARTS, RequestStore
from expunge.runs.job import JobFolder
from expunge.runs.night import NightFolder
from expunge.runs.outcomes import JobEnd, JobOutcome, NightPlan
from expunge.settings import ModelSettings, Settings
from expunge.unlearning.train import _is_whole
from expunge.words import Evidence, Hotfix, Ledger, ModelVersion, RemovalBatch, RemovalRequest, RequestState, UnlearnJob

Ask = Callable[..., RemovalRequest]
Judge = Callable[..., Evidence]


@pytest.fixture
def tracker(settings: Settings) -> Tracker:
    return Tracker(settings.tracking)


@dataclass(frozen=True)
class Night:
    """A batch of one request, planned on whatever champion there is."""

    batch: RemovalBatch
    planned: NightPlan

    @property
    def job(self) -> UnlearnJob:
        [job] = self.planned.jobs
        return job


Tonight = Callable[..., Night]


@pytest.fixture
def tonight(store: RequestStore, settings: Settings, tracker: Tracker, ask: Ask) -> Tonight:
    def make(name: str = "a", settings: Settings = settings, model: str = "flags") -> Night:
        store.add(ask(name, model=model))
        batch = store.drain(f"night-{name}")
        return Night(batch, plan_night(batch, settings, lambda model: (champion_of(tracker, model), [])))

    return make


def promoted(job: UnlearnJob, evidence: Evidence, tracker: Tracker, folder: Path) -> ModelVersion:
    folder.mkdir(exist_ok=True)
    (folder / "weights.safetensors").write_bytes(b"weights")
    version = register(
        tracker,
        job=job,
        hotfix=Hotfix(job=job.id, kind="full", path=folder, steps=1, digest="0"),
        evidence=evidence,
        run_id=tracker.ensure_run(job.model, job.id, params={}, tags={}),
        batch_id=job.batch,
        ledger=Ledger(model=job.model, version=None, requests=tuple(r.id for r in job.requests)),
    )
    return promote(tracker, version)


def test_a_job_whose_champion_changed_ends_before_it_trains_and_costs_no_attempt(
    store: RequestStore,
    settings: Settings,
    tracker: Tracker,
    tonight: Tonight,
    judge: Judge,
    tmp_path: Path,
) -> None:
    slow, fast = tonight("slow"), tonight("fast")
    promoted(fast.job, judge(fast.job), tracker, tmp_path / "hotfix")
    folder = JobFolder(tmp_path / slow.job.id)
    folder.job.write(slow.job)
    job.walk_job(folder, remember(settings).id)
    outcome = folder.outcome
    assert outcome is not None
    assert outcome.error is not None
    assert "the champion has changed" in outcome.error
    assert "models:/flags/1" in outcome.error
    settle(store, settings, slow.batch, slow.planned, [outcome])
    record = store.get("req-slow")
    assert (record.state, record.attempts) == (RequestState.ACCEPTED, 0)
    assert record.history[-1].detail == outcome.error


def test_a_job_that_has_promoted_its_own_version_goes_on(
    settings: Settings, tracker: Tracker, tonight: Tonight, judge: Judge, tmp_path: Path
) -> None:
    mine = tonight()
    assert job._changed(mine.job, settings, tracker) is None
    promoted(mine.job, judge(mine.job), tracker, tmp_path / "hotfix")
    assert job._changed(mine.job, settings, tracker) is None


def test_a_job_whose_model_changed_is_planned_again(
    settings: Settings, tracker: Tracker, tonight: Tonight, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    from expunge.families import resolve_source

    for file in Path(resolve_source("testbed:flags")).rglob("*"):
        if file.is_file():
            write_atomically(model / file.relative_to(resolve_source("testbed:flags")), file.read_bytes())
    copied = settings.model_copy(update={"models": {"flags": ModelSettings(source=str(model))}})
    mine = tonight(settings=copied)
    assert job._changed(mine.job, copied, tracker) is None
    index = model / "model_index.json"
    index.write_text(index.read_text() + " ")
    assert (
        job._changed(mine.job, copied, tracker) == "the files of model flags have changed since the night was planned"
    )


@pytest.mark.parametrize("harm", ["none", "gone", "cut"])
def test_weights_that_are_gone_or_damaged_are_trained_again(tmp_path: Path, harm: str) -> None:
    weights = tmp_path / "hotfix" / "unet" / "weights.safetensors"
    write_atomically(weights, b"weights")
    hotfix = Hotfix(job="flags-1", kind="full", path=tmp_path / "hotfix", steps=1, digest=file_digest(weights))
    done = JobFolder(tmp_path).hotfix
    done.write(hotfix)
    if harm == "gone":
        weights.unlink()
    if harm == "cut":
        weights.write_bytes(b"wei")
    assert done.read(valid=_is_whole) == (hotfix if harm == "none" else None)


def test_a_damaged_champion_is_no_place_to_start_from(
    tracker: Tracker, tonight: Tonight, judge: Judge, tmp_path: Path
) -> None:
    first = tonight("first")
    version = promoted(first.job, judge(first.job), tracker, tmp_path / "hotfix")
    (download(tracker, version.uri) / "weights.safetensors").write_bytes(b"other")
    second = tonight("second")
    assert second.job.warm_start == version.uri
    assert training.warm_start(second.job, JobFolder(tmp_path), tracker) is None


def test_a_blob_store_that_fails_skips_no_request(
    settings: Settings, tonight: Tonight, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = settings.model_copy(
        update={
            "training": settings.training.model_copy(update={"retain_size": 2}),
            "evaluation": settings.evaluation.model_copy(update={"sampling_steps": 2}),
        }
    )
    mine = tonight(settings=quick, model="faces")

    def fail(self: BlobStore, blob: str) -> bytes:
        raise StorageError("the blob store cannot read 000 (input/output error)")

    monkeypatch.setattr(BlobStore, "get", fail)
    folder = JobFolder(quick.runs / mine.job.id)
    folder.job.write(mine.job)
    with pytest.raises(StorageError, match="input/output error"):
        prepare(folder, quick, open_blobs(quick))


def test_a_node_with_another_home_is_the_platforms_fault(settings: Settings) -> None:
    remember(settings, database="d")
    with pytest.raises(UnavailableError, match=r"node .*: home .* is not the home that this night") as caught:
        job._settings("another")
    assert is_platforms(caught.value)


def test_a_promotion_that_was_undone_removes_nothing(
    store: RequestStore,
    settings: Settings,
    tracker: Tracker,
    tonight: Tonight,
    judge: Judge,
    tmp_path: Path,
) -> None:
    """The driver is killed after its job has promoted, and the version is gone before the next one settles it."""
    mine = tonight()
    evidence = judge(mine.job)
    version = promoted(mine.job, evidence, tracker, tmp_path / "hotfix")
    outcome = JobOutcome(job=mine.job, evidence=evidence, version=version)
    assert driver._confirmed(outcome, tracker) == outcome
    tracker.client.delete_model_version("flags", "1")
    undone = driver._confirmed(outcome, tracker)
    assert not undone.promoted
    settle(store, settings, mine.batch, mine.planned, [undone])
    record = store.get("req-a")
    assert (record.state, record.attempts) == (RequestState.ACCEPTED, 0)


@pytest.fixture
def ended(store: RequestStore, settings: Settings, tonight: Tonight) -> tuple[Night, NightFolder]:
    """A batch that was closed, and its folder with all that the driver wrote but its verdicts."""
    mine = tonight()
    folder = NightFolder(settings.runs / mine.batch.id)
    folder.plan_once(lambda: mine.planned)
    folder.job(mine.job.id).end.write(JobEnd(error="failed"))
    store.release_batch(mine.batch.id, "the night ended with an error")
    return mine, folder


@pytest.mark.parametrize("copy", ["kept", "lost"])
def test_verdicts_that_are_lost_are_put_together_again(
    settings: Settings, ended: tuple[Night, NightFolder], copy: str
) -> None:
    mine, folder = ended
    if copy == "lost":
        folder.job(mine.job.id).job.path.unlink()
    night = driver.run_night(settings, mine.batch.id)
    assert night is not None
    assert [outcome.error for outcome in night.outcomes] == ["failed"]
    assert folder.outcome == night


@pytest.mark.parametrize("lost", ["plan.json", "outcome.json"])
def test_a_batch_that_has_ended_is_not_run_again(
    store: RequestStore, settings: Settings, ended: tuple[Night, NightFolder], lost: str
) -> None:
    mine, folder = ended
    [path] = folder.path.rglob(lost)
    path.unlink()
    with pytest.raises(NotFoundError, match=rf"batch night-a has ended but .*{lost} is missing .* run `expunge night`"):
        driver.run_night(settings, mine.batch.id)
    assert store.get("req-a").state is RequestState.ACCEPTED


def test_a_plan_that_is_made_again_leaves_out_what_is_decided(store: RequestStore, ask: Ask) -> None:
    for name in ("done", "left", "later"):
        store.add(ask(name))
    batch = store.drain("night-1")
    store.transition("req-done", RequestState.REMOVED)
    store.transition("req-later", RequestState.ACCEPTED, attempt=False)
    store.drain("night-2")
    assert [r.id for r in driver._undecided(store, batch).requests] == ["req-left"]


def test_an_error_of_no_known_kind_ends_the_batch_in_one_sentence(
    store: RequestStore, settings: Settings, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(ask("a"))

    def fail(*arguments: object) -> None:
        raise KeyError("sample_size")

    monkeypatch.setattr(driver, "_run", fail)
    with pytest.raises(ExpungeError, match=r"batch n1: KeyError: 'sample_size': .* run `expunge night`"):
        driver.run_night(settings, "n1")
    record = store.get("req-a")
    assert (record.state, record.attempts) == (RequestState.ACCEPTED, 0)


def test_a_batch_that_kills_every_driver_at_once_is_given_up(
    store: RequestStore, settings: Settings, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(ask("a"))

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt("killed")

    monkeypatch.setattr(driver, "_with_lost", killed)
    for _ in range(MAX_STARTS):
        with pytest.raises(KeyboardInterrupt, match="killed"):
            driver.run_night(settings, "n1")
    with pytest.raises(ExpungeError, match="n1 was started 3 times without getting any further: what it"):
        driver.run_night(settings, "n1")
    record = store.get("req-a")
    assert (record.state, record.attempts) == (RequestState.ACCEPTED, 0)
