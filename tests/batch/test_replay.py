"""A new base model: what of a champion's ledger is unlearned from it, what cannot be, and what stays as it was."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from expunge.batch import driver
from expunge.batch.plan import plan_night
from expunge.batch.purging import purge
from expunge.batch.queue import batches_to_run
from expunge.batch.replay import Replay, look, run_replay
from expunge.errors import InputError, NotFoundError, StorageError
from expunge.families import resolve_source, source_digest
from expunge.files import file_digest
from expunge.registry.artifacts import download, ledger
from expunge.registry.tracking import Tracker
from expunge.registry.uploading import record_verification
from expunge.registry.versions import all_versions, promote
from expunge.registry.versions import champion as champion_of
from expunge.requests.blobs import open_blobs
from expunge.requests.store import RequestStore
from expunge.runs.job import JobFolder
from expunge.runs.night import NightFolder
from expunge.settings import Settings
from expunge.types import Evidence, Hotfix, Ledger, ModelVersion, PreparedJob, RemovalRequest, RequestState
from tests.batch.versions import registered
from tests.cli.conftest import Command
from tests.cli.conftest import command as command
from tests.runs.conftest import make_job

Ask = Callable[..., RemovalRequest]
Judge = Callable[..., Evidence]
NAMES = ("a", "b", "purged", "lost")


@pytest.fixture
def tracker(settings: Settings) -> Tracker:
    return Tracker(settings.tracking)


@dataclass(frozen=True)
class Removed:
    """A champion with four removals, of which two can be replayed, and a new base model."""

    champion: ModelVersion
    base: str
    settings: Settings
    """With the new base model as the source."""


@pytest.fixture
def removed(
    store: RequestStore, settings: Settings, tracker: Tracker, ask: Ask, judge: Judge, tmp_path: Path
) -> Removed:
    blobs = open_blobs(settings)
    requests = [ask(name, images=[blobs.put(name.encode())]) for name in NAMES]
    for request in requests:
        store.add(request)
    batch = store.drain("night-1")
    (job,) = plan_night(batch, settings, lambda model: (None, [])).jobs
    version = promote(tracker, registered(job, judge(job), tracker, tmp_path / "hotfix"))
    for request in requests:
        store.transition(request.id, RequestState.REMOVED, batch=batch.id)
    store.close_batch(batch.id)
    purge(settings, store, blobs, "req-purged")
    blobs.delete(requests[3].images[0])
    base = tmp_path / "base"
    shutil.copytree(resolve_source("testbed:flags"), base)
    index = base / "model_index.json"
    index.write_text(index.read_text() + " ")
    return Removed(version, str(base), settings.with_source("flags", str(base)))


def looked(removed: Removed, store: RequestStore, tracker: Tracker) -> Replay:
    return look(removed.settings, store, open_blobs(removed.settings), tracker, "flags")


def test_what_still_has_its_pictures_is_replayed_and_the_rest_is_named(
    removed: Removed, store: RequestStore, tracker: Tracker
) -> None:
    found = looked(removed, store, tracker)
    assert [request.id for request in found.requests] == ["req-a", "req-b"]
    assert found.refused == {
        "req-purged": "its pictures were purged",
        "req-lost": "a picture of it is missing or damaged",
    }
    assert looked(removed, store, tracker) == found, "a second start finds the same batch"


def test_another_base_or_another_champion_is_another_replay(
    removed: Removed, store: RequestStore, settings: Settings, tracker: Tracker, ask: Ask, judge: Judge, tmp_path: Path
) -> None:
    first = looked(removed, store, tracker).batch
    assert look(settings, store, open_blobs(settings), tracker, "flags").batch != first
    store.add(ask("c"))
    (job,) = plan_night(store.drain("night-2"), settings, lambda model: (removed.champion, [])).jobs
    version = registered(job, judge(job), tracker, tmp_path / "second")
    promote(tracker, version)
    with pytest.raises(InputError, match="no removal that can be replayed"):
        looked(removed, store, tracker)


def test_there_must_be_something_to_replay(store: RequestStore, settings: Settings, tracker: Tracker) -> None:
    with pytest.raises(NotFoundError, match="flags has no champion"):
        look(settings, store, open_blobs(settings), tracker, "flags")


def test_a_damaged_ledger_is_no_empty_one(removed: Removed, store: RequestStore, tracker: Tracker) -> None:
    (download(tracker, removed.champion.uri) / "ledger.json").write_text("{}")
    with pytest.raises(StorageError, match="does not match its digest"):
        looked(removed, store, tracker)


def states(store: RequestStore) -> dict[str, str]:
    return {record.request.id: str(record.state) for record in store.list()}


class Killed:
    """Stands where Ray would start a job, and is killed right after the plan was made."""

    def options(self, **options: object) -> "Killed":
        return self

    def remote(self, folder: JobFolder, home: str) -> None:
        raise KeyboardInterrupt("killed")


def trained(folder: JobFolder, evidence: Evidence) -> None:
    """Leave in a job's folder what its stages up to the evaluation do."""
    folder.weights.mkdir(parents=True)
    weights = folder.weights / "weights.safetensors"
    weights.write_bytes(b"new weights")
    tensors = {"forget": "0" * 64, "retain": "0" * 64, "conditioning": "0" * 64, "unrelated_prompts": 1}
    folder.prepared.write(PreparedJob.model_validate({"job": folder.id, **tensors, "surrogates": {}}))
    folder.hotfix.write(Hotfix(job=folder.id, kind="full", path=folder.weights, steps=1, digest=file_digest(weights)))
    folder.evidence.write(evidence)


@pytest.mark.usefixtures("without_ray")
def test_a_replay_that_was_killed_goes_on_registers_a_candidate_and_moves_nothing_else(
    removed: Removed, store: RequestStore, tracker: Tracker, judge: Judge, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, batch = states(store), looked(removed, store, tracker).batch
    with monkeypatch.context() as patch:
        patch.setattr(driver, "run_job", Killed())
        with pytest.raises(KeyboardInterrupt, match="killed"):
            run_replay(removed.settings, "flags")
    store.add(ask("waits"))
    night = NightFolder(removed.settings.runs / batch)
    assert night.plan is not None
    [job] = night.plan.jobs
    assert (job.base, job.source) == (source_digest(removed.settings.model("flags")), removed.base)
    assert ([request.id for request in job.requests], job.ledger) == (["req-a", "req-b"], ())
    trained(night.job(job.id), judge(job, b="failed"))
    outcome = run_replay(removed.settings, "flags")
    assert [str(version.version) for version in all_versions(tracker, "flags")] == ["1", "2"]
    current = champion_of(tracker, "flags")
    assert current is not None
    assert current.uri == removed.champion.uri, "a person decides when the new base model is served"
    [ended] = outcome.outcomes
    assert ended.version is not None
    assert ended.version.aliases == ("candidate",)
    assert outcome.refused.keys() == {"req-purged", "req-lost"}
    assert outcome.left == {"req-b", "req-purged", "req-lost"}
    assert states(store) == {**before, "req-waits": "accepted"}
    assert store.has_ended(batch)
    assert store.batch(batch).report is not None
    assert run_replay(removed.settings, "flags") == outcome, "it is not run twice"
    promote(tracker, ended.version)
    assert ledger(tracker, "flags").requests == ("req-a",)


def test_the_queue_is_never_drained_into_a_replay(
    removed: Removed, store: RequestStore, tracker: Tracker, ask: Ask
) -> None:
    batch = looked(removed, store, tracker).batch
    store.make_batch(batch)
    store.add(ask("waits"))
    with pytest.raises(InputError, match=f"{batch} is a replay: repeat the `expunge replay`"):
        driver.run_night(removed.settings, batch)
    with pytest.raises(InputError, match="is a replay"):
        next(batches_to_run(store, batch, None, 9))
    ordinary = [found.id for found, _ in batches_to_run(store, None, None, 9)]
    assert len(ordinary) == 1
    assert batch not in ordinary


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.usefixtures("without_ray")
def test_a_night_on_a_new_base_verifies_every_removal(
    removed: Removed,
    store: RequestStore,
    settings: Settings,
    tracker: Tracker,
    ask: Ask,
    judge: Judge,
    monkeypatch: pytest.MonkeyPatch,
    changed: bool,
) -> None:
    """Both were verified on the champion just now, which proves nothing of a new base model."""
    done = ("req-a", "req-b")
    record = Ledger(model="flags", version=None, requests=done, night=1, verified=dict.fromkeys(done, 1))
    evidence = judge(make_job("flags"))
    record_verification(tracker, removed.champion, evidence, record, open_blobs(settings).derive("ledger"))
    store.transition("req-lost", RequestState.ACCEPTED, attempt=False)
    monkeypatch.setattr(driver, "run_job", Killed())
    with pytest.raises(KeyboardInterrupt, match="killed"):
        driver.run_night(removed.settings if changed else settings, "night-2")
    planned = NightFolder(settings.runs / "night-2").plan
    assert planned is not None
    due = planned.jobs[0].verify
    assert due is not None
    assert len(due) == (2 if changed else 1)


def test_the_command_lists_what_it_would_do(command: Command, removed: Removed) -> None:
    ended = command("replay", "flags", "--source", removed.base, "--dry-run", "--json")
    assert ended.code == 0, ended.err
    assert ended.json["requests"] == ["req-a", "req-b"]
    assert ended.json["champion"] == removed.champion.uri
    assert ended.json["refused"].keys() == {"req-purged", "req-lost"}
    said = command("replay", "flags", "--source", removed.base, "--dry-run").out
    assert "cannot be replayed: req-purged: its pictures were purged" in said
    assert "would be replayed: req-b" in said
    assert command("replay", "faces", "--dry-run").code == 4
    assert command("replay", "flags", "--source", "/nowhere", "--dry-run").code == 2
