"""What a job was planned on, or has made, is gone: nothing is run for nothing, and no request is blamed."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from expunge.batch import driver, job, training
from expunge.batch.faults import is_platforms
from expunge.batch.plan import plan_night
from expunge.batch.settle import settle
from expunge.errors import ExpungeError, NotFoundError, StorageError, UnavailableError
from expunge.families import resolve_source
from expunge.files import file_digest, write_atomically
from expunge.preparation.prepare import prepare
from expunge.registry.artifacts import download
from expunge.registry.tracking import Tracker
from expunge.registry.versions import champion as champion_of
from expunge.registry.versions import promote
from expunge.requests.blobs import BlobStore, open_blobs
from expunge.requests.home import remember
from expunge.requests.store import MAX_STARTS, RequestStore
from expunge.runs.job import JobFolder
from expunge.runs.night import NightFolder
from expunge.runs.outcomes import JobEnd, NightPlan
from expunge.settings import Settings, load_settings
from expunge.types import (
    Evidence,
    Hotfix,
    ModelVersion,
    PreparedJob,
    RemovalBatch,
    RemovalRequest,
    RequestState,
    UnlearnJob,
)
from expunge.unlearning import train as train_module
from expunge.unlearning.train import train
from tests.batch.versions import registered
from tests.runs.conftest import make_job

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


class Training:
    """Stands where Ray Train would start workers."""

    def __init__(self, work: Callable[[], None], **options: object) -> None:
        pass

    def fit(self) -> None:
        raise ValueError("a training was started")


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "TorchTrainer", Training)
    monkeypatch.setattr(ray, "cluster_resources", dict)


@pytest.fixture
def tonight(store: RequestStore, settings: Settings, tracker: Tracker, ask: Ask) -> Tonight:
    def make(name: str = "a", settings: Settings = settings, model: str = "flags") -> Night:
        store.add(ask(name, model=model))
        batch = store.drain(f"night-{name}")
        return Night(batch, plan_night(batch, settings, lambda model: (champion_of(tracker, model), [])))

    return make


def promoted(job: UnlearnJob, evidence: Evidence, tracker: Tracker, folder: Path) -> ModelVersion:
    return promote(tracker, registered(job, evidence, tracker, folder))


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


def finished(folder: JobFolder, job: UnlearnJob, evidence: Evidence, tracker: Tracker) -> ModelVersion:
    """Leave in a job's folder what all its stages do, with its version promoted, as if killed right after that."""
    folder.job.write(job)
    version = promoted(job, evidence, tracker, folder.weights)
    blob = "0" * 64
    tensors = {"forget": blob, "retain": blob, "conditioning": blob, "unrelated_prompts": 1, "surrogates": {}}
    folder.prepared.write(PreparedJob.model_validate({"job": job.id, **tensors}))
    digest = file_digest(folder.weights / "weights.safetensors")
    folder.hotfix.write(Hotfix(job=job.id, kind="full", path=folder.weights, steps=1, digest=digest))
    folder.evidence.write(evidence)
    folder.version.write(version)
    return version


@pytest.mark.parametrize("changed", [False, True])
def test_a_job_that_has_promoted_its_own_version_goes_on_unless_its_model_changed(
    settings: Settings,
    tracker: Tracker,
    tonight: Tonight,
    judge: Judge,
    tmp_path: Path,
    changed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tmp_path / "model"
    shutil.copytree(resolve_source("testbed:flags"), model)
    monkeypatch.setenv("EXPUNGE_MODELS__FLAGS__SOURCE", str(model))
    mine = tonight(settings=load_settings())
    folder = JobFolder(settings.runs / mine.batch.id / mine.job.id)
    finished(folder, mine.job, judge(mine.job), tracker)
    if changed:
        index = model / "model_index.json"
        index.write_text(index.read_text() + " ")
    job.walk_job(folder, remember(settings).id)
    outcome = folder.outcome
    assert outcome is not None
    assert outcome.promoted is not changed
    assert outcome.outdated is changed
    if changed:
        assert outcome.error is not None
        assert "the files of model flags have changed" in outcome.error


@pytest.mark.parametrize("harm", ["none", "gone", "cut"])
@pytest.mark.usefixtures("no_training")
def test_weights_that_are_gone_or_damaged_are_trained_again(tmp_path: Path, harm: str) -> None:
    weights = tmp_path / "hotfix" / "unet" / "weights.safetensors"
    write_atomically(weights, b"weights")
    mine = make_job("flags")
    hotfix = Hotfix(job=mine.id, kind="full", path=tmp_path / "hotfix", steps=1, digest=file_digest(weights))
    folder = JobFolder(tmp_path)
    folder.job.write(mine)
    folder.hotfix.write(hotfix)
    if harm == "gone":
        weights.unlink()
    if harm == "cut":
        weights.write_bytes(b"wei")
    if harm == "none":
        assert train(folder, warm_start=None, record=lambda step, figures: None) == hotfix
    else:
        with pytest.raises(ExpungeError, match="a training was started"):
            train(folder, warm_start=None, record=lambda step, figures: None)


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


def test_a_node_with_another_home_is_the_platforms_fault(settings: Settings, tmp_path: Path) -> None:
    remember(settings, database="d")
    with pytest.raises(UnavailableError, match=r"node .* is not the home") as caught:
        job.walk_job(JobFolder(tmp_path / "job"), "another")
    assert is_platforms(caught.value)


@pytest.mark.parametrize("undone", [False, True])
@pytest.mark.usefixtures("without_ray")
def test_a_promotion_that_was_undone_removes_nothing(
    store: RequestStore, settings: Settings, tracker: Tracker, tonight: Tonight, judge: Judge, undone: bool
) -> None:
    """The driver is killed after its job has promoted, and the version is gone before the next one settles it."""
    mine = tonight()
    night = NightFolder(settings.runs / mine.batch.id)
    night.plan_once(lambda: mine.planned)
    folder = night.job(mine.job.id)
    finished(folder, mine.job, judge(mine.job), tracker)
    folder.end.write(JobEnd(promoted=True))
    if undone:
        tracker.client.delete_model_version("flags", "1")
    outcome = driver.run_night(settings, mine.batch.id)
    assert outcome is not None
    assert [each.promoted for each in outcome.outcomes] == [not undone]
    record = store.get("req-a")
    assert (record.state, record.attempts) == (RequestState.ACCEPTED if undone else RequestState.REMOVED, 0)


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


@pytest.mark.usefixtures("without_ray")
def test_a_plan_that_is_made_again_leaves_out_what_is_decided(
    store: RequestStore, settings: Settings, ask: Ask
) -> None:
    for name in ("done", "left", "later"):
        store.add(ask(name, model="unknown"))
    store.drain("night-1")
    store.transition("req-done", RequestState.REMOVED)
    store.transition("req-later", RequestState.ACCEPTED, attempt=False)
    store.drain("night-2")
    write_atomically(settings.runs / "night-1" / "plan.json", '{"batch": "nig')
    night = driver.run_night(settings, "night-1")
    assert night is not None
    assert list(night.refused) == ["req-left"], "its model is not configured"


def test_an_error_of_no_known_kind_ends_the_batch_in_one_sentence(
    store: RequestStore, settings: Settings, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(ask("a"))

    def fail(*arguments: object) -> None:
        raise KeyError("sample_size")

    monkeypatch.setattr(driver, "plan_night", fail)
    with pytest.raises(ExpungeError, match=r"batch n1: KeyError: 'sample_size': .*expunge night"):
        driver.run_night(settings, "n1")
    record = store.get("req-a")
    assert (record.state, record.attempts) == (RequestState.ACCEPTED, 0)


def test_a_batch_that_kills_every_driver_at_once_is_given_up(
    store: RequestStore, settings: Settings, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(ask("a"))

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt("killed")

    monkeypatch.setattr(driver, "plan_night", killed)
    for _ in range(MAX_STARTS):
        with pytest.raises(KeyboardInterrupt, match="killed"):
            driver.run_night(settings, "n1")
    with pytest.raises(ExpungeError, match="n1 was started 3 times"):
        driver.run_night(settings, "n1")
    record = store.get("req-a")
    assert (record.state, record.attempts) == (RequestState.ACCEPTED, 0)
