"""Promotion: only over the champion that a job was planned to build on."""

from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

from expunge.batch.job import walk_job
from expunge.batch.plan import plan_night
from expunge.batch.registering import promote_version, register_version
from expunge.errors import UnavailableError
from expunge.files import file_digest
from expunge.registry.tracking import Tracker
from expunge.registry.versions import all_versions, promote
from expunge.registry.versions import champion as champion_of
from expunge.requests.blobs import open_blobs
from expunge.requests.home import remember
from expunge.requests.store import RequestStore
from expunge.runs.job import JobFolder
from expunge.settings import Settings
from expunge.types import Evidence, Hotfix, ModelVersion, PreparedJob, RemovalRequest, RequestState, UnlearnJob
from tests import evidence as made
from tests.batch.versions import registered

Ask = Callable[..., RemovalRequest]
Judge = Callable[..., Evidence]


@pytest.fixture
def tracker(settings: Settings) -> Tracker:
    return Tracker(settings.tracking)


def evaluated(job: UnlearnJob, evidence: Evidence, version: ModelVersion, settings: Settings) -> JobFolder:
    """A job's folder as it is when promotion is up."""
    folder = JobFolder(settings.runs / job.batch / job.id)
    folder.job.write(job)
    folder.evidence.write(evidence)
    folder.version.write(version)
    return folder


@pytest.mark.parametrize("overtaken", [False, True])
def test_a_night_that_was_overtaken_does_not_undo_the_other(
    store: RequestStore, settings: Settings, tracker: Tracker, ask: Ask, judge: Judge, tmp_path: Path, overtaken: bool
) -> None:
    def planned(name: str) -> UnlearnJob:
        store.add(ask(name))
        (job,) = plan_night(
            store.drain(f"night-{name}"), settings, lambda model: (champion_of(tracker, model), [])
        ).jobs
        return job

    slow, fast = planned("slow"), planned("fast")
    if overtaken:
        promote(tracker, registered(fast, judge(fast), tracker, tmp_path / "hotfix"))
    version = registered(slow, judge(slow), tracker, tmp_path / "hotfix")
    folder = evaluated(slow, judge(slow), version, settings)
    assert promote_version(folder, tracker, store) is not overtaken
    now = champion_of(tracker, "flags")
    assert now is not None
    assert (now.uri == version.uri) is not overtaken
    if not overtaken:  # after a kill behind the promotion it is asked for again
        assert promote_version(folder, tracker, store)


def test_nothing_is_promoted_over_a_removal_that_it_does_not_hold(
    store: RequestStore, settings: Settings, tracker: Tracker, ask: Ask, judge: Judge, tmp_path: Path
) -> None:
    """A registry that was lost between the plan and the promotion: no champion stands in the way, and all is undone."""
    store.add(ask("old"))
    store.drain("night-old")
    store.transition("req-old", RequestState.REMOVED)
    store.add(ask("new"))
    (job,) = plan_night(store.drain("night-new"), settings, lambda model: (None, [])).jobs
    version = registered(job, judge(job), tracker, tmp_path / "hotfix")
    assert not promote_version(evaluated(job, judge(job), version, settings), tracker, store)
    assert champion_of(tracker, "flags") is None


@pytest.mark.parametrize(
    ("verdicts", "trained", "promoted"),
    [
        ({"a": "not_reproduced"}, True, True),
        ({"a": "not_reproduced", "b": "not_reproduced"}, True, False),
        ({"a": "not_reproduced", "b": "not_reproduced"}, False, False),
        ({}, False, False),
    ],
)
def test_what_is_not_reproduced_is_no_reason_to_promote_and_none_against_it(
    store: RequestStore,
    settings: Settings,
    tracker: Tracker,
    ask: Ask,
    judge: Judge,
    tmp_path: Path,
    verdicts: dict[str, str],
    trained: bool,
    promoted: bool,
) -> None:
    for name in "ab":
        store.add(ask(name))
    (job,) = plan_night(store.drain("night-1"), settings, lambda model: (None, [])).jobs
    evidence = judge(job, trained=trained, **verdicts)
    version = registered(job, evidence, tracker, tmp_path / "hotfix")
    assert promote_version(evaluated(job, evidence, version, settings), tracker, store) is promoted


@pytest.mark.parametrize("call", ["log_artifacts", "create_model_version", "set_registered_model_alias"])
def test_a_registry_that_goes_down_during_the_registration_costs_a_job_nothing(
    store: RequestStore,
    settings: Settings,
    tracker: Tracker,
    ask: Ask,
    judge: Judge,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
) -> None:
    """The job is not ended, and the next submission registers and promotes what this one has trained."""
    store.add(ask("a"))
    (job,) = plan_night(store.drain("night-1"), settings, lambda model: (None, [])).jobs
    folder = evaluated(job, judge(job), ModelVersion(name="flags", version="0", run_id=""), settings)
    folder.version.path.unlink()
    folder.weights.mkdir()
    weights = folder.weights / "weights.safetensors"
    weights.write_bytes(b"weights")
    folder.hotfix.write(Hotfix(job=job.id, kind="full", path=folder.weights, steps=1, digest=file_digest(weights)))
    tensors = {"forget": "0" * 64, "retain": "0" * 64, "conditioning": "0" * 64, "unrelated_prompts": 1}
    folder.prepared.write(PreparedJob.model_validate({"job": job.id, **tensors, "surrogates": {}}))

    def down(*arguments: object, **options: object) -> None:
        raise MlflowException("API request failed", error_code=TEMPORARILY_UNAVAILABLE)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, call, down)
        with pytest.raises(UnavailableError, match="cannot be used"):
            walk_job(folder, remember(settings).id)
    assert folder.end.read() is None
    assert champion_of(tracker, "flags") is None
    walk_job(folder, remember(settings).id)
    outcome = folder.outcome
    assert outcome is not None
    assert outcome.promoted
    assert [str(version.version) for version in all_versions(tracker, "flags")] == ["1"]


def logged(evidence: Evidence, job: UnlearnJob, settings: Settings, tracker: Tracker) -> dict[str, float]:
    """Register the job's hotfix and return the figures that MLflow then has."""
    folder = JobFolder(settings.runs / job.batch / job.id)
    folder.weights.mkdir(parents=True)
    (folder.weights / "weights.safetensors").write_bytes(b"weights")
    folder.job.write(job)
    folder.hotfix.write(Hotfix(job=job.id, kind="full", path=folder.weights, steps=7, digest="0"))
    folder.evidence.write(evidence)
    run = tracker.ensure_run(job.model, job.id, params={}, tags={})
    register_version(folder, tracker, run, open_blobs(settings))
    return tracker.client.get_run(run).data.metrics


@pytest.fixture
def job(store: RequestStore, settings: Settings, ask: Ask) -> UnlearnJob:
    for name in "ab":
        store.add(ask(name))
    return plan_night(store.drain("night-1"), settings, lambda model: (None, [])).jobs[0]


def test_mlflow_has_the_figures_of_the_whole_job(job: UnlearnJob, settings: Settings, tracker: Tracker) -> None:
    evidence = made.evidence(job.id, made.judged("req-a", worst=0.42), made.judged("req-b", worst=0.93))
    figures = logged(evidence, job, settings, tracker)
    assert figures["forgetting/passed"] == 1
    assert figures["forgetting/not_reproduced"] == 0
    assert figures["forgetting/worst_excess"] == pytest.approx(0.93)
    assert figures["integrity/psnr"] == pytest.approx(28.4)
    assert figures["integrity/psnr_worst"] == pytest.approx(16.8)
    assert "forgetting/shift_mean" not in figures


def test_a_job_without_evidence_about_unrelated_outputs_logs_what_it_has(
    job: UnlearnJob, settings: Settings, tracker: Tracker
) -> None:
    nothing = (made.not_reproduced("req-a"), made.not_reproduced("req-b"))
    figures = logged(made.evidence(job.id, *nothing, trained=False), job, settings, tracker)
    assert figures == {"forgetting/passed": 0, "forgetting/not_reproduced": 2}
