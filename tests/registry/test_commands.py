"""The commands that read and move versions, on a registry and a request store as nights leave them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from expunge.batch.promoting import OvertakenError, promote_by_hand, roll_back, weigh
from expunge.families import resolve_source, source_digest
from expunge.registry import artifacts, uploading, versions
from expunge.registry.ledgers import contents
from expunge.registry.tracking import Tracker
from expunge.requests.blobs import open_blobs
from expunge.requests.store import RequestStore
from expunge.runs.job import JobFolder
from expunge.settings import ModelSettings, TrainingSettings, load_settings
from expunge.types import Hotfix, Ledger, ModelVersion, RemovalRequest, RequestState, UnlearnJob
from tests import evidence as made
from tests.cli.conftest import Command

ACCEPTED, REMOVED = RequestState.ACCEPTED, RequestState.REMOVED
FAILED = 2.0
"""A bound of the excess that is far over the threshold."""


@pytest.fixture
def tracker(empty_registry: Tracker) -> Tracker:
    return empty_registry


Night = Callable[..., ModelVersion]


@pytest.fixture
def night(store: RequestStore, tracker: Tracker, tmp_path: Path) -> Night:
    """Leave what a night does: its requests judged, a version of all that passed, and by default a new champion."""

    def leave(
        number: int,
        *,
        new: str,
        failed: str = "",
        promoted: bool = True,
        keep: str = "all",
        psnr: float = 28.4,
        source: str = "testbed:flags",
    ) -> ModelVersion:
        earlier = artifacts.ledger(tracker, "flags")
        held = [id for id in earlier.requests if keep == "all" or id in keep.split()]
        asked = [request(id) for id in new.split()]
        for each in asked:
            store.add(each)
        batch = store.drain(f"night-{number}", only=new.split()).id
        job = UnlearnJob(
            batch=batch,
            model="flags",
            source=source,
            base=source_digest(ModelSettings(source=source)),
            resolution=(32, 48),
            requests=tuple(asked),
            ledger=tuple(request(id) for id in held),
            training=TrainingSettings(seed=number),
        )
        judged = [made.judged(each.id, *([FAILED] if each.id in failed.split() else [])) for each in asked]
        gate = load_settings().gate_for("flags").model_dump(exclude={"max_attempts"})
        rest = {"unverified": tuple(held), "integrity": made.integrity(psnr), "basis": made.basis(gate=gate)}
        evidence = made.evidence(job.id, *judged).model_copy(update=rest)
        folder = tmp_path / f"hotfix-{number}"
        folder.mkdir()
        (folder / "pytorch_lora_weights.safetensors").write_bytes(job.id.encode())
        passed = [each.id for each in asked if each.id not in failed.split()]
        ledger = Ledger(
            model="flags",
            version=None,
            requests=(*held, *passed),
            night=earlier.night + 1,
            verified={**earlier.verified, **dict.fromkeys(passed, earlier.night + 1)},
        )
        version = uploading.register(
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
        if asked:
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
    file = artifacts.download(tracker, version.uri) / "ledger.json"
    file.write_text(json.dumps({**json.loads(file.read_bytes()), "requests": ["r-1"]}))
    ended = command("ledger", "flags")
    assert (ended.code, ended.out) == (6, "")
    assert "models:/flags/1: ledger.json does not match its digest" in ended.err


def test_a_rollback_that_brings_removals_back_is_refused_and_names_them(
    command: Command, night: Night, tracker: Tracker, store: RequestStore
) -> None:
    night(1, new="r-1")
    night(2, new="r-2 r-3")
    before = [record.model_dump_json() for record in store.list()]
    ended = command("rollback", "flags", "--to", "1")
    assert ended.code == 3
    assert "would bring back 2 removals: r-2, r-3" in ended.err
    assert "--accept-resurfacing" in ended.err
    assert champion(tracker) == "2"
    assert [record.model_dump_json() for record in store.list()] == before


def test_what_resurfaces_is_back_in_the_queue_and_its_history_says_why(
    command: Command, night: Night, tracker: Tracker, store: RequestStore
) -> None:
    night(1, new="r-1")
    night(2, new="r-2")
    ended = command("rollback", "flags", "--to", "1", "--accept-resurfacing", "--json")
    assert ended.json == {"model": "flags", "champion": "1", "before": "2", "resurfaced": ["r-2"]}
    assert champion(tracker) == "1"
    assert states(store) == {"r-1": REMOVED, "r-2": ACCEPTED}
    record = store.get("r-2")
    assert record.attempts == 0
    told, moved = (event.detail for event in record.history[-2:])
    assert told.startswith("rollback of models:/flags/1 over models:/flags/2 by ")
    assert moved.startswith("resurfaced: models:/flags/1, which ")
    assert store.get("r-1").history[-1].detail == told
    assert [request.id for request in store.drain(None).requests] == ["r-2"]


def test_a_rollback_that_loses_nothing_needs_no_consent(command: Command, night: Night, tracker: Tracker) -> None:
    night(1, new="r-1")
    night(2, new="")
    assert command("rollback", "flags", "--to", "1").code == 0
    assert champion(tracker) == "1"


def test_a_rollback_that_was_killed_is_finished_by_the_same_command(
    command: Command, night: Night, tracker: Tracker, store: RequestStore
) -> None:
    first = night(1, new="r-1")
    night(2, new="r-2")
    versions.reinstate(tracker, first)  # and then it was killed
    arguments = ("rollback", "flags", "--to", "1")
    assert command(*arguments).code == 3
    assert command(*arguments, "--accept-resurfacing").code == 0
    assert states(store) == {"r-1": REMOVED, "r-2": ACCEPTED}


@pytest.mark.parametrize("deleted", ["version", "alias"])
def test_a_champion_that_was_deleted_by_hand_is_replaced_by_an_earlier_one(
    command: Command, night: Night, tracker: Tracker, store: RequestStore, deleted: str
) -> None:
    night(1, new="r-1")
    night(2, new="r-2")
    if deleted == "version":
        tracker.client.delete_model_version("flags", "2")
    else:
        tracker.client.delete_registered_model_alias("flags", "champion")
    ended = command("ledger", "flags")
    assert ended.code == 4
    assert "flags has no version with the alias 'champion'" in ended.err
    ended = command("rollback", "flags", "--to", "1")
    assert ended.code == 3
    assert "would bring back 1 removal: r-2" in ended.err
    ended = command("rollback", "flags", "--to", "1", "--accept-resurfacing", "--json")
    assert ended.json == {"model": "flags", "champion": "1", "before": None, "resurfaced": ["r-2"]}
    assert states(store) == {"r-1": REMOVED, "r-2": ACCEPTED}


@pytest.mark.parametrize(
    ("to", "code", "said"),
    [
        ("2", 2, "was never the champion"),
        ("4", 2, "is newer than the champion"),
        ("9", 4, "not found"),
        ("champoin", 4, "no version with the alias"),
    ],
)
def test_only_an_earlier_champion_can_be_rolled_back_to(
    command: Command, night: Night, tracker: Tracker, to: str, code: int, said: str
) -> None:
    night(1, new="r-1")
    night(2, new="r-2", promoted=False)
    night(3, new="r-3")
    night(4, new="r-4", promoted=False)
    ended = command("rollback", "flags", "--to", to, "--accept-resurfacing")
    assert ended.code == code
    assert said in ended.err
    assert champion(tracker) == "3"


def test_a_rollback_to_damaged_weights_is_refused(command: Command, night: Night, tracker: Tracker) -> None:
    first = night(1, new="r-1")
    night(2, new="r-2")
    (artifacts.download(tracker, first.uri) / "pytorch_lora_weights.safetensors").write_bytes(b"other weights")
    ended = command("rollback", "flags", "--to", "1", "--accept-resurfacing")
    assert ended.code == 6
    assert "does not match its digest" in ended.err
    assert champion(tracker) == "2"


def test_a_candidate_that_no_night_has_promoted_is_promoted_by_a_person(
    command: Command, night: Night, tracker: Tracker, store: RequestStore
) -> None:
    """Its evidence covers all of its ledger, so nothing is evaluated again."""
    night(1, new="r-1 r-2", failed="r-2", promoted=False)
    assert states(store) == {"r-1": ACCEPTED, "r-2": ACCEPTED}
    ended = command("promote", "flags", "candidate", "--yes", "--json")
    assert ended.code == 0, ended.err
    moved = {"resurfaced": [], "removed": ["r-1"], "accepted_failures": []}
    assert ended.json == {"model": "flags", "champion": "1", "before": None, **moved}
    assert champion(tracker) == "1"
    assert states(store) == {"r-1": REMOVED, "r-2": ACCEPTED}
    record = store.get("r-1")
    assert record.evidence is not None
    assert (record.evidence["version"], record.evidence["verdict"]) == ("models:/flags/1", "passed")
    assert "promotion of models:/flags/1 over no champion by " in " ".join(event.detail for event in record.history)
    assert store.open_batches() == {}
    assert command("promote", "flags", "1", "--yes").code == 0, "a second time changes nothing"
    assert states(store) == {"r-1": REMOVED, "r-2": ACCEPTED}


def test_a_promotion_that_brings_removals_back_is_refused(
    command: Command, night: Night, tracker: Tracker, store: RequestStore
) -> None:
    night(1, new="r-1", promoted=False)
    night(2, new="r-2")
    ended = command("promote", "flags", "1", "--yes")
    assert ended.code == 3
    assert "would bring back 1 removal: r-2" in ended.err
    assert champion(tracker) == "2"
    assert command("promote", "flags", "1", "--yes", "--accept-resurfacing").code == 0
    assert champion(tracker) == "1"
    assert states(store) == {"r-1": REMOVED, "r-2": ACCEPTED}


def test_a_version_that_does_not_pass_is_promoted_only_on_record(
    command: Command, night: Night, tracker: Tracker, store: RequestStore
) -> None:
    night(1, new="r-1", psnr=12, promoted=False)
    ended = command("promote", "flags", "1", "--yes")
    assert ended.code == 3
    assert "models:/flags/1 does not pass: unrelated outputs changed too much" in ended.err
    assert champion(tracker) is None
    store.add(request("r-2"))
    assert command("promote", "flags", "1", "--yes", "--accept-failed").code == 0
    assert champion(tracker) == "1"
    assert (
        "who accepted: unrelated outputs changed too much"
        in tracker.client.get_model_version("flags", "1").tags["expunge.accepted"]
    )
    assert states(store) == {"r-1": ACCEPTED, "r-2": ACCEPTED}
    assert command("ledger", "flags", "--json").json["removals"] == []


def test_a_version_of_another_base_model_is_promoted_once_that_is_the_models_own(
    command: Command, night: Night, tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next night would start from the model's own, and undo the promotion."""
    other = tmp_path / "other"
    shutil.copytree(resolve_source("testbed:flags"), other)
    (other / "model_index.json").write_text((other / "model_index.json").read_text() + " ")
    night(1, new="r-1", promoted=False, source=str(other))
    ended = command("promote", "flags", "1", "--yes")
    assert ended.code == 2
    assert "set models.flags.source to the base model that it was trained from" in ended.err
    monkeypatch.setenv("EXPUNGE_MODELS__FLAGS__SOURCE", str(other))
    assert command("promote", "flags", "1", "--yes").code == 0
    assert champion(tracker) == "1"


def test_nothing_is_promoted_without_a_yes(command: Command, night: Night, tracker: Tracker) -> None:
    night(1, new="r-1", promoted=False)
    ended = command("promote", "flags", "1")
    assert ended.code == 2
    assert "--yes" in ended.err
    assert champion(tracker) is None


def test_of_two_changes_that_were_weighed_at_once_the_second_is_refused(
    night: Night, tracker: Tracker, store: RequestStore
) -> None:
    key = open_blobs(load_settings()).derive("ledger")
    first, second, third = (night(number, new=f"r-{number}", promoted=number == 1) for number in (1, 2, 3))
    changes = [weigh(store, tracker, contents(tracker, version, key)) for version in (second, third)]
    promote_by_hand(store, tracker, changes[0], "jane")
    with pytest.raises(OvertakenError, match=r"was models:/flags/1, and is models:/flags/2 by now"):
        promote_by_hand(store, tracker, changes[1], "joe")
    with pytest.raises(OvertakenError, match="by now"):
        roll_back(store, tracker, replace(changes[1], after=contents(tracker, first, key)), "joe")
    assert champion(tracker) == "2"
    assert states(store)["r-2"] is REMOVED
    assert states(store)["r-3"] is ACCEPTED


def test_only_superseded_candidates_and_the_weights_of_ended_nights_are_pruned(
    command: Command, night: Night, tracker: Tracker, store: RequestStore
) -> None:
    night(1, new="r-1")
    night(2, new="r-2", promoted=False)
    night(3, new="r-3")
    night(4, new="r-4", promoted=False)
    night(5, new="r-5", promoted=False)
    tracker.client.set_registered_model_alias("flags", "canary", "4")
    gone = artifacts.download(tracker, "models:/flags/2")
    runs = load_settings().runs
    job = UnlearnJob(
        batch="night-1", model="flags", source="s", resolution=(32, 48), requests=(), training=TrainingSettings()
    )
    ended, other = JobFolder(runs / "night-1" / job.id), JobFolder(runs / "open" / job.id)
    store.add(request("r-6"))
    store.drain("open", only=["r-6"])
    for folder in (ended, other):
        folder.job.write(job)
        (folder.checkpoints / "checkpoint_1").mkdir(parents=True)
        (folder.checkpoints / "checkpoint_1" / "part-0").write_bytes(b"0" * 1000)
    assert command("prune", "flags").code == 2
    planned = command("prune", "flags", "--dry-run", "--json").json
    assert (planned["versions"], planned["folders"]) == (["models:/flags/2"], [str(ended.checkpoints)])
    assert planned["folder_bytes"] == 1000
    assert gone.is_dir()
    assert ended.checkpoints.is_dir()
    assert command("prune", "flags", "--yes", "--json").json == {**planned, "deleted": True}
    assert [str(version.version) for version in versions.all_versions(tracker, "flags")] == ["1", "3", "4", "5"]
    assert not gone.exists()
    assert not ended.checkpoints.exists()
    assert ended.job.read() == job
    assert other.checkpoints.is_dir()
    assert artifacts.download(tracker, "models:/flags@champion").is_dir()
    assert command("prune", "flags", "--yes", "--json").json["versions"] == []
