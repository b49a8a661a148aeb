"""Registered hotfixes: one model version per job, its ledger and evidence beside the weights, and two aliases.

`candidate` is the newest version, `champion` the one that its evidence promoted. A version's artifact folder holds the
hotfix in diffusers' own format, `expunge.json` (what it is and what it was made with), `ledger.json` (the ids of every
request it removes) and `evidence.json` (numbers only); the tag `expunge.seal` shows a change of any of them. A version
that was judged by a weaker gate than the default says so in the tag `expunge.gate_loosened`.

A version's files never change. If it is verified again later, the newer ledger and evidence lie in a sealed folder of
their own, `verification/JOB`, which the tag `expunge.verification` names.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pydantic import ValidationError

from expunge.errors import InputError, NotFoundError, StorageError
from expunge.logs import get_logger
from expunge.registry import seals
from expunge.registry.flavor import write_flavor
from expunge.registry.seals import ABOUT, EVIDENCE, LEDGER, BrokenSealError
from expunge.registry.tracking import JOB_TAG, Tracker
from expunge.requests.audit import release
from expunge.types import CHAMPION, Evidence, Hotfix, Ledger, ModelVersion, UnlearnJob

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion

CANDIDATE = "candidate"
BATCH_TAG, REQUESTS_TAG, PASSED_TAG = "expunge.batch", "expunge.requests", "expunge.passed"
PREVIOUS_TAG, NO_PREVIOUS = "expunge.previous_champion", "none"
LOOSENED_TAG, ACCEPTED_TAG = "expunge.gate_loosened", "expunge.accepted"
SEAL_TAG, VERIFICATION_TAG = "expunge.seal", "expunge.verification"
FOLDER, VERIFICATIONS = "hotfix", "verification"
SHOWN = ("source", "base", "kind", "digest", "release", "protocol")
"""What `MLmodel` repeats of `expunge.json`, for whoever reads the registry without Expunge."""
# MLflow 3 allows 100,000 characters, version 2 only 5,000. The full list is in ledger.json.
TAG_LENGTH = 5_000


class DamagedVersionError(StorageError):
    """The registry has the version, but its artifacts differ from what was registered."""


def register(
    tracker: Tracker,
    *,
    job: UnlearnJob,
    hotfix: Hotfix,
    evidence: Evidence,
    run_id: str,
    batch_id: str,
    ledger: Ledger,
    key: bytes,
) -> ModelVersion:
    """Upload the job's hotfix, sealed with `key`, create its version, make it the candidate and return it.

    After a kill at any point, a second call does what is missing. The version appears only when all its files are
    there; an existing version is never changed, and an older one does not take the alias from a newer one. Raises
    InputError if the hotfix has no weights.
    """
    found = _find(tracker, job)
    if found is None:
        source, seal = _upload(tracker, job, hotfix, evidence, run_id, ledger, key)
        tags = {
            JOB_TAG: job.id,
            SEAL_TAG: seal,
            BATCH_TAG: batch_id,
            REQUESTS_TAG: joined(ledger.requests),
            PASSED_TAG: joined(sorted(evidence.passed)),
        }
        if evidence.basis is not None and evidence.basis.loosened:
            tags[LOOSENED_TAG] = "; ".join(evidence.basis.loosened)[:TAG_LENGTH]
        _ensure_model(tracker, job.model)
        with tracker.reaching():
            found = tracker.client.create_model_version(job.model, source, run_id, tags=tags)
    newest = _by_alias(tracker, job.model, CANDIDATE)
    if newest is None or int(newest.version) < int(found.version):
        _set_alias(tracker, job.model, CANDIDATE, found.version)
    return _fresh(tracker, job.model, found.version)


def promote(tracker: Tracker, version: ModelVersion, *, accepted: str = "") -> ModelVersion:
    """Make `version` the champion and remember its predecessor. Repeating the call changes nothing.

    accepted: what a person has accepted although the evidence fails, in words; it is kept as a tag.
    """
    if accepted:
        with tracker.reaching():
            tracker.client.set_model_version_tag(version.name, version.version, ACCEPTED_TAG, accepted[:TAG_LENGTH])
    before = _by_alias(tracker, version.name, CHAMPION)
    if before is None or str(before.version) != version.version:
        previous = NO_PREVIOUS if before is None else str(before.version)
        with tracker.reaching():  # the tag first: after a kill in between, the alias is still where it was
            tracker.client.set_model_version_tag(version.name, version.version, PREVIOUS_TAG, previous)
        _set_alias(tracker, version.name, CHAMPION, version.version)
    return _fresh(tracker, version.name, version.version)


def reinstate(tracker: Tracker, version: ModelVersion) -> ModelVersion:
    """Make a former champion the champion again. Raises InputError if it never was."""
    if version.version not in former_champions(tracker, version.name):
        raise InputError(
            f"{version.uri} was never the champion, so no gate has let it pass",
            hint=f"run `expunge promote {version.name} {version.version}`, which verifies it",
        )
    _set_alias(tracker, version.name, CHAMPION, version.version)
    return _fresh(tracker, version.name, version.version)


def former_champions(tracker: Tracker, model: str) -> frozenset[str]:
    """Return the numbers of the versions that are or were champion.

    Release 0.1.0 did not mark a model's first champion, which is known by its successor's tag.
    """
    found: set[str] = set()
    for version in all_versions(tracker, model):
        previous = version.tags.get(PREVIOUS_TAG)
        if previous is not None:
            found |= {str(version.version), previous}
    current = _by_alias(tracker, model, CHAMPION)
    return frozenset({*found, *([str(current.version)] if current else [])} - {NO_PREVIOUS})


def all_versions(tracker: Tracker, model: str) -> "list[MlflowVersion]":
    """Return every version of the model, oldest first, as MLflow has it."""
    return sorted(_search(tracker, f"name = '{model}'"), key=lambda version: int(version.version))


def champion(tracker: Tracker, model: str) -> ModelVersion | None:
    """Return the model's champion, or None."""
    found = _by_alias(tracker, model, CHAMPION)
    return None if found is None else _word(found)


def version_of(tracker: Tracker, job: UnlearnJob) -> ModelVersion | None:
    """Return the version that the job registered, or None."""
    found = _find(tracker, job)
    return None if found is None else _word(found)


def ledger(tracker: Tracker, model: str) -> Ledger:
    """Return the ids of the requests that the champion removes; none without a champion.

    It is empty, too, if the champion's ledger is missing or damaged, because nothing then shows what it removes.
    """
    current = champion(tracker, model)
    if current is None:
        return Ledger(model=model, version=None, requests=())
    try:
        return read_ledger(tracker, current)
    except DamagedVersionError as error:
        get_logger("registry").warning(
            "the champion's ledger is missing or damaged", version=current.uri, why=str(error)
        )
        return Ledger(model=model, version=current.version, requests=())


def read_ledger(tracker: Tracker, version: ModelVersion, key: bytes | None = None) -> Ledger:
    """Return what `version` removes; see `read_sealed` for `key`. Raises DamagedVersionError."""
    return parsed_ledger(version, read_sealed(tracker, version, (LEDGER,), key)[LEDGER])


def parsed_ledger(version: ModelVersion, stored: bytes) -> Ledger:
    """Return what `version` removes by the content of its ledger's file. Raises DamagedVersionError."""
    try:
        return Ledger.model_validate_json(stored).model_copy(update={"version": version.version})
    except ValidationError:
        raise damaged(version, f"{LEDGER} is damaged") from None


def read_sealed(
    tracker: Tracker, version: ModelVersion, names: Iterable[str], key: bytes | None = None
) -> dict[str, bytes]:
    """Return files of the version's latest verification, each checked against its digest, without its weights.

    With `key`, the signature is checked, too; `is_signed` says whether there is one. Raises DamagedVersionError.
    """
    statement = _statement(tracker, version)
    try:
        about = seals.opened(tracker.read(f"{statement.folder}/{ABOUT}"), statement.seal, key)
        found = {name: tracker.read(f"{statement.folder}/{name}") for name in names}
        for name, data in found.items():
            seals.check_file(about, name, data)
    except NotFoundError:
        raise damaged(version, "its files are missing") from None
    except BrokenSealError as error:
        raise damaged(version, str(error)) from None
    return found


def base_of(tracker: Tracker, version: ModelVersion) -> str | None:
    """Return the digest of the base model's files; None if that is not known."""
    with tracker.reaching():
        folder = tracker.client.get_model_version_download_uri(version.name, version.version)
    try:
        return json.loads(tracker.read(f"{folder}/{ABOUT}")).get("base")
    except (NotFoundError, ValueError, AttributeError):
        return None


def is_signed(tracker: Tracker, version: ModelVersion) -> bool:
    """Return whether the version has a seal: release 0.1.0 made none."""
    return _statement(tracker, version).seal is not None


def resolve(tracker: Tracker, uri: str) -> ModelVersion:
    """Return the version at `models:/NAME@ALIAS` or `models:/NAME/VERSION`. Raises InputError or NotFoundError."""
    name, at, alias = uri.removeprefix("models:/").partition("@")
    if uri.startswith("models:/") and name and at and alias and "/" not in name:
        found = _by_alias(tracker, name, alias)
        if found is None:
            raise NotFoundError(
                f"{name} has no version with the alias {alias!r}", hint="name a version instead, e.g. models:/NAME/1"
            )
        return _word(found)
    name, _, version = uri.removeprefix("models:/").partition("/")
    if not uri.startswith("models:/") or not name or not version.isdecimal():
        raise InputError(f"{uri!r} does not name a version", hint="write models:/NAME@champion or models:/NAME/3")
    return _fresh(tracker, name, version)


def named(tracker: Tracker, text: str) -> ModelVersion:
    """Return the version that a person names: MODEL, MODEL@ALIAS or MODEL@3. Raises InputError or NotFoundError.

    Without `@`, it is the champion.
    """
    model, _, which = text.removeprefix("models:/").partition("@")
    return resolve(tracker, f"models:/{model}/{which}" if which.isdecimal() else f"models:/{model}@{which or CHAMPION}")


def download(tracker: Tracker, uri: str, to: Path | None = None) -> Path:
    """Return the version's folder after checking its files against their digests.

    Local artifacts are copied only if `to` is given, so do not write into the result. Raises DamagedVersionError if a
    file is missing or differs, StorageError if one cannot be read.
    """
    version = resolve(tracker, uri)
    with tracker.reaching():
        source = tracker.client.get_model_version_download_uri(version.name, version.version)
        seal = tracker.client.get_model_version(version.name, version.version).tags.get(SEAL_TAG)
    try:
        folder = tracker.fetch(source, to)
    except NotFoundError:
        raise damaged(version, "its files are missing") from None
    try:
        seals.check_folder(folder, seal)
    except BrokenSealError as error:
        raise damaged(version, str(error)) from None
    except FileNotFoundError as error:
        raise damaged(version, f"{Path(error.filename).name} is missing") from None
    except OSError as error:
        raise StorageError(
            f"{version.uri}: {error.filename} cannot be read ({error.strerror})", hint="check the artifact store"
        ) from None
    return folder


@contextmanager
def checked_files(tracker: Tracker, version: ModelVersion) -> Iterator[Path]:
    """Yield the version's folder, as `download` does; a copy of a remote one is deleted afterwards."""
    with tempfile.TemporaryDirectory() as temporary:
        yield download(tracker, version.uri, None if tracker.embedded else Path(temporary))


def batch_of(tracker: Tracker, version: ModelVersion) -> str:
    """Return the id of the batch that trained the version. Raises InputError if Expunge did not register it."""
    with tracker.reaching():
        batch = tracker.client.get_model_version(version.name, version.version).tags.get(BATCH_TAG)
    if batch is None:
        raise InputError(f"{version.uri} is not a version of Expunge's", hint="name one that a night has registered")
    return batch


def record_verification(
    tracker: Tracker, version: ModelVersion, evidence: Evidence, ledger: Ledger, key: bytes
) -> None:
    """Store newer evidence about `version`, and the ledger that follows from it; both replace the older ones."""
    name = f"{VERIFICATIONS}/{evidence.job}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / evidence.job
        folder.mkdir()
        _write_statement(folder, evidence, ledger)
        about = {"model": version.name, "version": version.version, "job": evidence.job}
        seal = seals.seal(folder, about, key)
        tracker.log_folder(version.run_id, name, folder)
    with tracker.reaching():
        tracker.client.set_model_version_tag(version.name, version.version, VERIFICATION_TAG, f"{name} {seal}")


def damaged(version: ModelVersion, why: str) -> DamagedVersionError:
    """Make the error for a version that is damaged, and say `why`."""
    return DamagedVersionError(f"{version.uri}: {why}", hint="restore the artifact store, or roll back")


def joined(ids: Iterable[str]) -> str:
    """Join ids with commas; beyond TAG_LENGTH, replace the rest by a count."""
    ids = tuple(ids)
    text = ",".join(ids)
    if len(text) <= TAG_LENGTH:
        return text
    kept, length = 0, 0
    while length + len(ids[kept]) + 1 <= TAG_LENGTH - 24:
        length += len(ids[kept]) + 1
        kept += 1
    return f"{','.join(ids[:kept])},... and {len(ids) - kept} more"


def _upload(
    tracker: Tracker, job: UnlearnJob, hotfix: Hotfix, evidence: Evidence, run_id: str, ledger: Ledger, key: bytes
) -> tuple[str, str]:
    """Upload what belongs to a version; return the folder's URI and its seal."""
    if not any(hotfix.path.rglob("*.safetensors")):
        raise InputError(f"hotfix of {job.id}: no safetensors in its folder", hint="train the job again")
    about = {
        "model": job.model,
        "source": job.source,
        "base": job.base,
        "kind": hotfix.kind,
        "job": job.id,
        "steps": hotfix.steps,
        "digest": hotfix.digest,
        "resolution": job.resolution,
        "release": release(),
        "protocol": evidence.protocol_version,
        "training": job.training.model_dump(mode="json"),
    }
    shown = {f"expunge.{name}": about[name] for name in SHOWN}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / FOLDER
        write_flavor(folder, shown, run_id)
        shutil.copytree(hotfix.path, folder, dirs_exist_ok=True)
        _write_statement(folder, evidence, ledger)
        seal = seals.seal(folder, about, key)
        return tracker.log_folder(run_id, FOLDER, folder), seal


def _write_statement(folder: Path, evidence: Evidence, ledger: Ledger) -> None:
    (folder / LEDGER).write_text(ledger.model_dump_json(indent=2) + "\n")
    # Numbers only: a verdict's sentence may quote the request.
    private = {"pictures": True, "requests": {"__all__": {"why": True, "rules": {"__all__": {"why"}}}}}
    (folder / EVIDENCE).write_text(evidence.model_dump_json(indent=2, exclude=private) + "\n")


class _Statement(NamedTuple):
    """The folder that says what a version removes, and its seal; None if release 0.1.0 made it."""

    folder: str
    seal: str | None


def _statement(tracker: Tracker, version: ModelVersion) -> _Statement:
    with tracker.reaching():
        found = tracker.client.get_model_version(version.name, version.version)
        verification = found.tags.get(VERIFICATION_TAG)
        if verification is not None:
            name, _, seal = verification.partition(" ")
            return _Statement(f"{tracker.client.get_run(version.run_id).info.artifact_uri}/{name}", seal)
        folder = tracker.client.get_model_version_download_uri(version.name, version.version)
    return _Statement(folder, found.tags.get(SEAL_TAG))


def _ensure_model(tracker: Tracker, name: str) -> None:
    from mlflow.exceptions import MlflowException

    with tracker.reaching():
        try:
            tracker.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def _find(tracker: Tracker, job: UnlearnJob) -> "MlflowVersion | None":
    found = _search(tracker, f"name = '{job.model}' and tags.`{JOB_TAG}` = '{job.id}'")
    return min(found, key=lambda version: int(version.version), default=None)


def _search(tracker: Tracker, query: str) -> "Iterator[MlflowVersion]":
    token = None
    while True:
        with tracker.reaching():
            page = tracker.client.search_model_versions(query, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _by_alias(tracker: Tracker, name: str, alias: str) -> "MlflowVersion | None":
    from mlflow.exceptions import MlflowException

    with tracker.reaching():
        try:
            return tracker.client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            # A missing model gives the first code, a missing alias either of them, depending on the store.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def _set_alias(tracker: Tracker, name: str, alias: str, version: int | str) -> None:
    with tracker.reaching():
        tracker.client.set_registered_model_alias(name, alias, str(version))


def _fresh(tracker: Tracker, name: str, version: int | str) -> ModelVersion:
    with tracker.reaching():
        return _word(tracker.client.get_model_version(name, str(version)))


def _word(found: "MlflowVersion") -> ModelVersion:
    return ModelVersion(
        name=found.name, version=str(found.version), run_id=found.run_id or "", aliases=tuple(sorted(found.aliases))
    )
