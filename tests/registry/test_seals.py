"""A version that anybody has tampered with is refused, whichever of its files was changed, added or exchanged."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from expunge.registry import artifacts, load_pipeline, uploading, versions
from expunge.registry.artifacts import DamagedVersionError
from expunge.registry.ledgers import contents
from expunge.registry.tracking import Tracker
from expunge.types import Evidence, Hotfix, Ledger, ModelVersion, UnlearnJob
from tests.registry.conftest import KEY

Register = Callable[..., ModelVersion]


@pytest.fixture
def files(tracker: Tracker, register: Register) -> Path:
    """The stored files of a champion."""
    return artifacts.download(tracker, versions.promote(tracker, register("r-1", "r-2")).uri)


def without(folder: Path, request: str) -> str:
    """The ledger of a version as somebody would write it who wants a removal forgotten."""
    ledger = json.loads((folder / "ledger.json").read_bytes())
    ledger["requests"].remove(request)
    return json.dumps(ledger)


@pytest.mark.parametrize("name", ["ledger.json", "evidence.json", "pytorch_lora_weights.safetensors"])
def test_a_changed_file_is_refused(tracker: Tracker, files: Path, name: str) -> None:
    (files / name).write_text(without(files, "r-2") if name == "ledger.json" else "{}")
    with pytest.raises(DamagedVersionError, match=f"{name} does not match its digest"):
        artifacts.download(tracker, "models:/flags@champion")
    with pytest.raises(DamagedVersionError, match=f"models:/flags/1: {name} does not match its digest"):
        load_pipeline("models:/flags@champion", tracking_uri=tracker.uri)


def test_a_changed_ledger_shows_no_removal_so_the_next_night_makes_up_for_it(tracker: Tracker, files: Path) -> None:
    (files / "ledger.json").write_text(without(files, "r-2"))
    assert artifacts.ledger(tracker, "flags").requests == ()


def test_a_changed_ledger_is_refused_even_if_its_digest_was_changed_with_it(tracker: Tracker, files: Path) -> None:
    (files / "ledger.json").write_text(without(files, "r-2"))
    _list_anew(files)
    with pytest.raises(DamagedVersionError, match=r"expunge\.json does not match its digest"):
        artifacts.download(tracker, "models:/flags@champion")
    assert artifacts.ledger(tracker, "flags").requests == ()


def test_whoever_writes_to_the_registry_as_well_cannot_sign(tracker: Tracker, files: Path) -> None:
    (files / "ledger.json").write_text(without(files, "r-2"))
    about = _list_anew(files)
    version = versions.resolve(tracker, "models:/flags@champion")
    seal = f"{hashlib.sha256(about).hexdigest()} {'0' * 64}"
    tracker.client.set_model_version_tag("flags", version.version, "expunge.seal", seal)
    with pytest.raises(DamagedVersionError, match="not signed with this platform's key"):
        contents(tracker, version, KEY)


def test_an_added_file_is_refused(tracker: Tracker, files: Path) -> None:
    (files / "unet").mkdir()
    (files / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"other weights")
    with pytest.raises(DamagedVersionError, match=r"diffusion_pytorch_model\.safetensors was added later"):
        artifacts.download(tracker, "models:/flags@champion")


def test_the_files_of_another_version_are_refused(tracker: Tracker, register: Register, files: Path) -> None:
    other = artifacts.download(tracker, register("r-1", seed=1).uri)
    shutil.rmtree(files)
    shutil.copytree(other, files)
    with pytest.raises(DamagedVersionError, match=r"models:/flags/1: expunge\.json does not match its digest"):
        artifacts.download(tracker, "models:/flags@champion")


def test_a_version_of_an_earlier_release_is_read_and_said_to_be_unsigned(tracker: Tracker, files: Path) -> None:
    about = json.loads((files / "expunge.json").read_bytes())
    for name in ("ledger.json", "evidence.json"):
        del about["files"][name]
    for name in ("MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt"):
        del about["files"][name]
        (files / name).unlink()
    (files / "expunge.json").write_text(json.dumps(about))
    tracker.client.delete_model_version_tag("flags", "1", "expunge.seal")
    assert artifacts.download(tracker, "models:/flags@champion") == files
    found = contents(tracker, versions.resolve(tracker, "models:/flags@champion"), KEY)
    assert (found.ledger.requests, found.signed) == (("r-1", "r-2"), False)


def test_a_later_verification_replaces_ledger_and_evidence_and_is_sealed_too(
    tracker: Tracker,
    register: Register,
    make_job: Callable[..., UnlearnJob],
    make_evidence: Callable[..., Evidence],
    make_hotfix: Callable[..., Hotfix],
) -> None:
    version = register("r-1", "r-2")
    evidence = make_evidence(make_job("r-1", "r-2", seed=7), "r-2")
    ledger = Ledger(model="flags", version=None, requests=("r-2",), night=4, verified={"r-2": 4})
    uploading.record_verification(tracker, version, evidence, ledger, KEY)
    found = contents(tracker, version, KEY)
    assert found.ledger == ledger.model_copy(update={"version": "1"})
    assert {request: found.verdict(request) for request in ("r-1", "r-2")} == {"r-1": "failed", "r-2": "passed"}
    assert artifacts.download(tracker, version.uri).joinpath("expunge.json").is_file()
    folder = tracker.fetch(tracker.client.get_run(version.run_id).info.artifact_uri or "") / "verification"
    (folder / evidence.job / "ledger.json").write_text(ledger.model_copy(update={"requests": ()}).model_dump_json())
    with pytest.raises(DamagedVersionError, match=r"ledger\.json does not match its digest"):
        contents(tracker, version, KEY)


def _list_anew(folder: Path) -> bytes:
    """Write the ledger's new digest into `expunge.json`; return that file."""
    about = json.loads((folder / "expunge.json").read_bytes())
    about["files"]["ledger.json"] = hashlib.sha256((folder / "ledger.json").read_bytes()).hexdigest()
    data = json.dumps(about).encode()
    (folder / "expunge.json").write_bytes(data)
    return data
