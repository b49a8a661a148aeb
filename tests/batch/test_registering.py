"""Promotion: only over the champion that a job was planned to build on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from expunge.batch.plan import plan_night
from expunge.batch.registering import promote_version
from expunge.registry.tracking import Tracker
from expunge.registry.versions import champion as champion_of
from expunge.registry.versions import promote
from expunge.requests.store import RequestStore
from expunge.runs.job import JobFolder
from expunge.settings import Settings
from expunge.types import Evidence, ModelVersion, RemovalRequest, RequestState, UnlearnJob
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
