"""Registered hotfixes: one model version per job, its ledger and evidence beside the weights, and two aliases.

`candidate` is the newest version, `champion` the one that its evidence promoted. A version's artifact folder holds the
hotfix in diffusers' own format, `expunge.json` (what it is and what it was made with), `ledger.json` (the ids of every
request it removes) and `evidence.json` (numbers only). A version that was judged by a weaker gate than the default says
so in the tag `expunge.gate_loosened`.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from expunge.errors import InputError, NotFoundError, StorageError
from expunge.files import file_digest
from expunge.logs import get_logger
from expunge.registry.tracking import JOB_TAG, Tracker
from expunge.types import CHAMPION, Evidence, Hotfix, Ledger, ModelVersion, UnlearnJob

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion

CANDIDATE = "candidate"
BATCH_TAG, REQUESTS_TAG, PASSED_TAG = "expunge.batch", "expunge.requests", "expunge.passed"
PREVIOUS_TAG = "expunge.previous_champion"
LOOSENED_TAG = "expunge.gate_loosened"
FOLDER = "hotfix"
LEDGER, ABOUT = "ledger.json", "expunge.json"
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
) -> ModelVersion:
    """Upload the job's hotfix, create its version, make it the candidate and return it.

    After a kill at any point, a second call does what is missing. The version appears only when all its files are
    there; an existing version is never changed, and an older one does not take the alias from a newer one. Raises
    InputError if the hotfix has no weights.
    """
    found = _find(tracker, job)
    if found is None:
        source = _upload(tracker, job, hotfix, evidence, run_id, ledger)
        tags = {
            JOB_TAG: job.id,
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


def promote(tracker: Tracker, version: ModelVersion) -> ModelVersion:
    """Make `version` the champion and remember its predecessor. Repeating the call changes nothing."""
    before = _by_alias(tracker, version.name, CHAMPION)
    if before is None or str(before.version) != version.version:
        if before is not None:  # the tag first: after a kill in between, the alias is still where it was
            with tracker.reaching():
                tracker.client.set_model_version_tag(version.name, version.version, PREVIOUS_TAG, str(before.version))
        _set_alias(tracker, version.name, CHAMPION, version.version)
    return _fresh(tracker, version.name, version.version)


def rollback(tracker: Tracker, model: str) -> ModelVersion:
    """Make the champion's predecessor the champion again. Raises NotFoundError if there is none."""
    current = _by_alias(tracker, model, CHAMPION)
    if current is None:
        raise NotFoundError(f"{model} has no champion", hint="promote a version first")
    previous = current.tags.get(PREVIOUS_TAG)
    if previous is None:
        raise NotFoundError(f"{model}: version {current.version} is the first champion", hint="promote another version")
    _set_alias(tracker, model, CHAMPION, previous)
    return _fresh(tracker, model, previous)


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
    with tracker.reaching():
        source = tracker.client.get_model_version_download_uri(current.name, current.version)
    try:
        stored = Ledger.model_validate_json(tracker.read(f"{source}/{LEDGER}"))
    except (NotFoundError, ValidationError):
        get_logger("registry").warning("the champion's ledger is missing or damaged", version=current.uri)
        return Ledger(model=model, version=current.version, requests=())
    return stored.model_copy(update={"version": current.version})


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


def download(tracker: Tracker, uri: str, to: Path | None = None) -> Path:
    """Return the version's folder after checking its files against their digests.

    Local artifacts are copied only if `to` is given, so do not write into the result. Raises DamagedVersionError if a
    file is missing or differs, StorageError if one cannot be read.
    """
    version = resolve(tracker, uri)
    with tracker.reaching():
        source = tracker.client.get_model_version_download_uri(version.name, version.version)
    try:
        folder = tracker.fetch(source, to)
    except NotFoundError:
        raise _damaged(version, "its files are missing") from None
    try:
        expected = json.loads((folder / ABOUT).read_bytes())["files"]
        differing = [name for name in expected if file_digest(folder / name) != expected[name]]
    except FileNotFoundError as error:
        raise _damaged(version, f"{Path(error.filename).name} is missing") from None
    except OSError as error:
        raise StorageError(
            f"{version.uri}: {error.filename} cannot be read ({error.strerror})", hint="check the artifact store"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise _damaged(version, f"{ABOUT} is damaged") from None
    if differing:
        raise _damaged(version, f"{differing[0]} does not match its digest")
    return folder


def _damaged(version: ModelVersion, why: str) -> DamagedVersionError:
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


def _upload(tracker: Tracker, job: UnlearnJob, hotfix: Hotfix, evidence: Evidence, run_id: str, ledger: Ledger) -> str:
    files = sorted(path for path in hotfix.path.rglob("*") if path.is_file())
    if not any(path.suffix == ".safetensors" for path in files):
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
        "training": job.training.model_dump(mode="json"),
        "files": {path.relative_to(hotfix.path).as_posix(): file_digest(path) for path in files},
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / FOLDER
        shutil.copytree(hotfix.path, folder)
        (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
        (folder / LEDGER).write_text(ledger.model_dump_json(indent=2) + "\n")
        # Numbers only: a verdict's sentence may quote the request.
        private = {"pictures": True, "requests": {"__all__": {"why": True, "rules": {"__all__": {"why"}}}}}
        (folder / "evidence.json").write_text(evidence.model_dump_json(indent=2, exclude=private) + "\n")
        return tracker.log_folder(run_id, FOLDER, folder)


def _ensure_model(tracker: Tracker, name: str) -> None:
    from mlflow.exceptions import MlflowException

    with tracker.reaching():
        try:
            tracker.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def _find(tracker: Tracker, job: UnlearnJob) -> "MlflowVersion | None":
    with tracker.reaching():
        found = tracker.client.search_model_versions(f"name = '{job.model}' and tags.`{JOB_TAG}` = '{job.id}'")
    return min(found, key=lambda version: int(version.version), default=None)


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
