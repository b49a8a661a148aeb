"""A job is registered once, whatever is killed when; aliases move as documented; nothing personal is stored."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from expunge.errors import InputError, NotFoundError, StorageError
from expunge.registry import artifacts, uploading, versions
from expunge.registry.tracking import Tracker
from expunge.types import Evidence, Hotfix, Ledger, ModelVersion, UnlearnJob
from tests import evidence as made
from tests.registry.conftest import KEY, killed_at

Register = Callable[..., ModelVersion]


def count(tracker: Tracker) -> int:
    return len(tracker.client.search_model_versions("name = 'flags'"))


def test_a_version_has_its_tags_files_and_alias(
    tracker: Tracker, register: Register, make_job: Callable[..., UnlearnJob]
) -> None:
    version = register()
    assert (version.name, version.version, version.aliases) == ("flags", "1", ("candidate",))
    tags = tracker.client.get_model_version("flags", "1").tags
    assert len(tags.pop("expunge.seal").split()) == 2
    assert tags == {
        "expunge.batch": "night-1",
        "expunge.job": make_job().id,
        "expunge.requests": "r-1,r-2",
        "expunge.passed": "r-1",
    }
    folder = artifacts.download(tracker, "models:/flags@candidate")
    names = {path.name for path in folder.iterdir()}
    mlflows = {"MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt"}
    assert names == {"pytorch_lora_weights.safetensors", "expunge.json", "ledger.json", "evidence.json"} | mlflows
    about = json.loads((folder / "expunge.json").read_text())
    assert (about["model"], about["source"], about["kind"], about["digest"]) == (
        "flags",
        "testbed:flags",
        "lora",
        "d" * 64,
    )


@pytest.mark.parametrize("loosened", [(), ("max_excess 1000 instead of 0.6", "min_psnr 0 instead of 20")])
def test_a_version_says_whether_its_gate_was_loosened(
    tracker: Tracker,
    make_job: Callable[..., UnlearnJob],
    make_hotfix: Callable[..., Hotfix],
    loosened: tuple[str, ...],
) -> None:
    job = make_job()
    version = uploading.register(
        tracker,
        job=job,
        hotfix=make_hotfix(job),
        evidence=made.evidence(job.id, made.judged("r-1"), loosened=loosened),
        run_id=tracker.ensure_run(job.model, job.id, params={}, tags={}),
        batch_id="night-1",
        ledger=Ledger(model=job.model, version=None, requests=("r-1",)),
        key=KEY,
    )
    tag = tracker.client.get_model_version("flags", version.version).tags.get("expunge.gate_loosened")
    assert tag == ("; ".join(loosened) or None)
    evidence = json.loads((artifacts.download(tracker, version.uri) / "evidence.json").read_text())
    assert evidence["basis"]["loosened"] == list(loosened)
    assert "why" not in {*evidence["requests"][0], *evidence["requests"][0]["rules"][0]}


def test_nothing_personal_and_no_picture_is_stored(tracker: Tracker, register: Register) -> None:
    folder = artifacts.download(tracker, register().uri)
    for path in [*folder.iterdir(), Path(tracker.uri.removeprefix("sqlite:///"))]:
        stored = path.read_bytes()
        assert b"personal-" not in stored, path.name
        assert b"b" * 64 not in stored, path.name


def test_registering_again_changes_nothing(tracker: Tracker, register: Register) -> None:
    assert register() == register()
    assert count(tracker) == 1


@pytest.mark.parametrize(
    "call", ["log_artifacts", "create_registered_model", "create_model_version", "set_registered_model_alias"]
)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_at_any_call_converges(
    tracker: Tracker, register: Register, monkeypatch: pytest.MonkeyPatch, call: str, after: bool
) -> None:
    with killed_at(monkeypatch, tracker, call, after=after):
        register()
    version = register()
    assert count(tracker) == 1
    assert version.aliases == ("candidate",)
    assert artifacts.download(tracker, version.uri).joinpath("ledger.json").is_file()


def test_an_older_job_does_not_take_the_alias_back(register: Register) -> None:
    register(seed=0)
    second = register(seed=1)
    assert second.aliases == ("candidate",)
    assert register(seed=0).aliases == ()


def test_a_champion_is_replaced_and_can_be_reinstated(tracker: Tracker, register: Register) -> None:
    assert versions.champion(tracker, "flags") is None
    assert versions.former_champions(tracker, "flags") == frozenset()
    first, second, third = register(seed=0), register(seed=1), register(seed=2)
    assert versions.promote(tracker, first).aliases == ("champion",)
    assert versions.promote(tracker, third).aliases == ("candidate", "champion")
    versions.promote(tracker, third)  # again: its predecessor must not become itself
    assert versions.former_champions(tracker, "flags") == {"1", "3"}
    assert versions.reinstate(tracker, first).aliases == ("champion",)
    assert versions.former_champions(tracker, "flags") == {"1", "3"}
    with pytest.raises(InputError, match="models:/flags/2 was never the champion"):
        versions.reinstate(tracker, second)


def test_the_first_champion_of_an_earlier_release_is_known_by_its_successor(
    tracker: Tracker, register: Register
) -> None:
    first, second = register(seed=0), register(seed=1)
    tracker.client.set_registered_model_alias("flags", "champion", first.version)
    versions.promote(tracker, second)
    assert versions.reinstate(tracker, first).aliases == ("champion",)


def test_the_ledger_is_the_champions(tracker: Tracker, register: Register) -> None:
    assert artifacts.ledger(tracker, "flags") == Ledger(model="flags", version=None, requests=())
    version = register("r-1", "r-9")
    assert artifacts.ledger(tracker, "flags").requests == ()
    versions.promote(tracker, version)
    assert artifacts.ledger(tracker, "flags") == Ledger(model="flags", version="1", requests=("r-1", "r-9"))


def test_many_requests_are_cut_in_the_tag_only(tracker: Tracker, register: Register) -> None:
    ids = [f"r-{'x' * 40}-{i:04d}" for i in range(300)]
    version = register(*ids)
    tag = tracker.client.get_model_version("flags", version.version).tags["expunge.requests"]
    kept = tag.count("r-")
    assert len(tag) <= versions.TAG_LENGTH
    assert tag.endswith(f",... and {300 - kept} more")
    versions.promote(tracker, version)
    assert artifacts.ledger(tracker, "flags").requests == tuple(ids)


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_damaged_weights_are_noticed(tracker: Tracker, register: Register, damage: str) -> None:
    version = register()
    weights = artifacts.download(tracker, version.uri) / "pytorch_lora_weights.safetensors"
    if damage == "changed":
        weights.write_bytes(b"something else")
    else:
        weights.unlink()
    with pytest.raises(StorageError, match="does not match its digest" if damage == "changed" else "is missing"):
        artifacts.download(tracker, version.uri)


def test_a_copy_is_made_where_asked(tracker: Tracker, register: Register, tmp_path: Path) -> None:
    folder = artifacts.download(tracker, register().uri, tmp_path / "copy")
    assert folder.is_relative_to(tmp_path / "copy")
    assert (folder / "expunge.json").is_file()


@pytest.mark.parametrize(
    "uri", ["flags", "models:/flags", "models:/flags/latest", "models:/@champion", "runs:/1/hotfix", "models:/a/1/b"]
)
def test_what_names_no_version_is_refused(tracker: Tracker, uri: str) -> None:
    with pytest.raises(InputError, match="write models:/NAME@champion or models:/NAME/3"):
        versions.resolve(tracker, uri)


@pytest.mark.parametrize("uri", ["models:/flags@champion", "models:/flags/3"])
def test_an_absent_version_is_not_found(tracker: Tracker, uri: str) -> None:
    with pytest.raises(NotFoundError, match=r"alias|not found"):
        artifacts.download(tracker, uri)


def test_a_hotfix_without_weights_is_refused(
    tracker: Tracker, make_job: Callable[..., UnlearnJob], make_evidence: Callable[..., Evidence], tmp_path: Path
) -> None:
    job = make_job()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no safetensors"):
        uploading.register(
            tracker,
            job=job,
            hotfix=Hotfix(job=job.id, kind="lora", path=tmp_path / "empty", steps=1, digest=""),
            evidence=make_evidence(job),
            run_id=tracker.ensure_run(job.model, job.id, params={}, tags={}),
            batch_id="night-1",
            ledger=Ledger(model=job.model, version=None, requests=()),
            key=KEY,
        )
    assert count(tracker) == 0


@pytest.mark.parametrize("damage", ["gone", "all gone", "", "{", "[]", '{"model": 3}'])
def test_a_ledger_that_is_gone_or_damaged_shows_no_removal(tracker: Tracker, register: Register, damage: str) -> None:
    version = register("r-1")
    versions.promote(tracker, version)
    folder = artifacts.download(tracker, version.uri)
    match damage:
        case "gone":
            (folder / "ledger.json").unlink()
        case "all gone":
            shutil.rmtree(folder)
        case text:
            (folder / "ledger.json").write_text(text)
    assert artifacts.ledger(tracker, "flags") == Ledger(model="flags", version="1", requests=())


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"files": 3}'])
def test_a_description_that_was_cut_short_is_a_damaged_version(tracker: Tracker, register: Register, text: str) -> None:
    version = register()
    (artifacts.download(tracker, version.uri) / "expunge.json").write_text(text)
    with pytest.raises(artifacts.DamagedVersionError, match=r"models:/flags/1: expunge\.json does not match"):
        artifacts.download(tracker, version.uri)
    tracker.client.delete_model_version_tag("flags", "1", "expunge.seal")  # as release 0.1.0 left it
    with pytest.raises(artifacts.DamagedVersionError, match=r"models:/flags/1: expunge\.json is damaged"):
        artifacts.download(tracker, version.uri)


def test_a_version_without_files_is_damaged(tracker: Tracker, register: Register) -> None:
    version = register()
    shutil.rmtree(artifacts.download(tracker, version.uri))
    with pytest.raises(artifacts.DamagedVersionError, match="models:/flags/1: its files are missing"):
        artifacts.download(tracker, version.uri)
