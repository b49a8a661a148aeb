"""The files of a version, checked against their digests: all of them, or those that are read without the weights.

A version's artifact folder holds the hotfix in diffusers' own format, `expunge.json` (what it is and what it was made
with), `ledger.json` (the ids of every request it removes), `evidence.json` (numbers only), and what `flavor` writes for
MLflow; the tag `expunge.seal` shows a change of any of them. If it was verified again later, the newer ledger and
evidence lie in a sealed folder of their own, which the tag `expunge.verification` names.
"""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from expunge.errors import NotFoundError, StorageError
from expunge.logs import get_logger
from expunge.registry import seals
from expunge.registry.seals import ABOUT, LEDGER, BrokenSealError
from expunge.registry.tracking import Tracker
from expunge.registry.versions import SEAL_TAG, VERIFICATION_TAG, champion, resolve
from expunge.types import Ledger, ModelVersion


class DamagedVersionError(StorageError):
    """The registry has the version, but its artifacts differ from what was registered."""


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


def is_signed(tracker: Tracker, version: ModelVersion) -> bool:
    """Return whether the version has a seal: release 0.1.0 made none."""
    return _statement(tracker, version).seal is not None


def base_of(tracker: Tracker, version: ModelVersion) -> str | None:
    """Return the digest of the base model's files; None if the version does not say. Raises DamagedVersionError."""
    with tracker.reaching():
        folder = tracker.client.get_model_version_download_uri(version.name, version.version)
        seal = tracker.client.get_model_version(version.name, version.version).tags.get(SEAL_TAG)
    try:
        return seals.opened(tracker.read(f"{folder}/{ABOUT}"), seal).get("base")
    except NotFoundError:
        raise damaged(version, "its files are missing") from None
    except BrokenSealError as error:
        raise damaged(version, str(error)) from None


def damaged(version: ModelVersion, why: str) -> DamagedVersionError:
    """Make the error for a version that is damaged, and say `why`."""
    return DamagedVersionError(f"{version.uri}: {why}", hint="restore the artifact store, or roll back")


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
