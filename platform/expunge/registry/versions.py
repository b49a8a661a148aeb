"""The registered versions of a model, and its two aliases: `candidate`, the newest, and `champion`, which is served.

What a version is, beyond its files, is in its tags. A version that was judged by a weaker gate than the default says so
in the tag `expunge.gate_loosened`.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from expunge.errors import InputError, NotFoundError
from expunge.registry.tracking import JOB_TAG, Tracker
from expunge.types import CHAMPION, ModelVersion, UnlearnJob

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion as MlflowVersion

CANDIDATE = "candidate"
BATCH_TAG, REQUESTS_TAG, PASSED_TAG = "expunge.batch", "expunge.requests", "expunge.passed"
PREVIOUS_TAG, NO_PREVIOUS = "expunge.previous_champion", "none"
LOOSENED_TAG, ACCEPTED_TAG = "expunge.gate_loosened", "expunge.accepted"
SEAL_TAG, VERIFICATION_TAG = "expunge.seal", "expunge.verification"
FOLDER, VERIFICATIONS = "hotfix", "verification"
# MLflow 3 allows 100,000 characters, version 2 only 5,000. The full list is in ledger.json.
TAG_LENGTH = 5_000


def promote(tracker: Tracker, version: ModelVersion, *, accepted: str = "") -> ModelVersion:
    """Make `version` the champion and remember its predecessor. Repeating the call changes nothing.

    accepted: what a person has accepted although the evidence fails, in words; it is kept as a tag.
    """
    if accepted:
        with tracker.reaching():
            tracker.client.set_model_version_tag(version.name, version.version, ACCEPTED_TAG, accepted[:TAG_LENGTH])
    before = by_alias(tracker, version.name, CHAMPION)
    if before is None or str(before.version) != version.version:
        previous = NO_PREVIOUS if before is None else str(before.version)
        with tracker.reaching():  # the tag first: after a kill in between, the alias is still where it was
            tracker.client.set_model_version_tag(version.name, version.version, PREVIOUS_TAG, previous)
        set_alias(tracker, version.name, CHAMPION, version.version)
    return fresh(tracker, version.name, version.version)


def reinstate(tracker: Tracker, version: ModelVersion) -> ModelVersion:
    """Make a former champion the champion again. Raises InputError if it never was."""
    if version.version not in former_champions(tracker, version.name):
        raise InputError(
            f"{version.uri} was never the champion, so no gate has let it pass",
            hint=f"run `expunge promote {version.name} {version.version}`, which verifies it",
        )
    set_alias(tracker, version.name, CHAMPION, version.version)
    return fresh(tracker, version.name, version.version)


def former_champions(tracker: Tracker, model: str) -> frozenset[str]:
    """Return the numbers of the versions that are or were champion.

    Release 0.1.0 did not mark a model's first champion, which is known by its successor's tag.
    """
    found: set[str] = set()
    for version in all_versions(tracker, model):
        previous = version.tags.get(PREVIOUS_TAG)
        if previous is not None:
            found |= {str(version.version), previous}
    current = by_alias(tracker, model, CHAMPION)
    return frozenset({*found, *([str(current.version)] if current else [])} - {NO_PREVIOUS})


def all_versions(tracker: Tracker, model: str) -> "list[MlflowVersion]":
    """Return every version of the model, oldest first, as MLflow has it."""
    return sorted(_search(tracker, f"name = '{model}'"), key=lambda version: int(version.version))


def champion(tracker: Tracker, model: str) -> ModelVersion | None:
    """Return the model's champion, or None."""
    found = by_alias(tracker, model, CHAMPION)
    return None if found is None else _word(found)


def version_of(tracker: Tracker, job: UnlearnJob) -> ModelVersion | None:
    """Return the version that the job registered, or None."""
    found = find(tracker, job)
    return None if found is None else _word(found)


def resolve(tracker: Tracker, uri: str) -> ModelVersion:
    """Return the version at `models:/NAME@ALIAS` or `models:/NAME/VERSION`. Raises InputError or NotFoundError."""
    name, at, alias = uri.removeprefix("models:/").partition("@")
    if uri.startswith("models:/") and name and at and alias and "/" not in name:
        found = by_alias(tracker, name, alias)
        if found is None:
            raise NotFoundError(
                f"{name} has no version with the alias {alias!r}", hint="name a version instead, e.g. models:/NAME/1"
            )
        return _word(found)
    name, _, version = uri.removeprefix("models:/").partition("/")
    if not uri.startswith("models:/") or not name or not version.isdecimal():
        raise InputError(f"{uri!r} does not name a version", hint="write models:/NAME@champion or models:/NAME/3")
    return fresh(tracker, name, version)


def named(tracker: Tracker, text: str) -> ModelVersion:
    """Return the version that a person names: MODEL, MODEL@ALIAS or MODEL@3. Raises InputError or NotFoundError.

    Without `@`, it is the champion.
    """
    model, _, which = text.removeprefix("models:/").partition("@")
    return resolve(tracker, f"models:/{model}/{which}" if which.isdecimal() else f"models:/{model}@{which or CHAMPION}")


def batch_of(tracker: Tracker, version: ModelVersion) -> str:
    """Return the id of the batch that trained the version. Raises InputError if Expunge did not register it."""
    with tracker.reaching():
        batch = tracker.client.get_model_version(version.name, version.version).tags.get(BATCH_TAG)
    if batch is None:
        raise InputError(f"{version.uri} is not a version of Expunge's", hint="name one that a night has registered")
    return batch


def ensure_model(tracker: Tracker, name: str) -> None:
    """Make the registered model, unless there is one."""
    from mlflow.exceptions import MlflowException

    with tracker.reaching():
        try:
            tracker.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def find(tracker: Tracker, job: UnlearnJob) -> "MlflowVersion | None":
    """Return the version that the job registered, as MLflow has it, or None."""
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


def by_alias(tracker: Tracker, name: str, alias: str) -> "MlflowVersion | None":
    """Return the version that an alias points to, as MLflow has it, or None."""
    from mlflow.exceptions import MlflowException

    with tracker.reaching():
        try:
            return tracker.client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            # A missing model gives the first code, a missing alias either of them, depending on the store.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def set_alias(tracker: Tracker, name: str, alias: str, version: int | str) -> None:
    """Point an alias to a version, whatever it pointed to before."""
    with tracker.reaching():
        tracker.client.set_registered_model_alias(name, alias, str(version))


def fresh(tracker: Tracker, name: str, version: int | str) -> ModelVersion:
    """Return a version with the aliases that it has at this moment. Raises NotFoundError."""
    with tracker.reaching():
        return _word(tracker.client.get_model_version(name, str(version)))


def _word(found: "MlflowVersion") -> ModelVersion:
    return ModelVersion(
        name=found.name, version=str(found.version), run_id=found.run_id or "", aliases=tuple(sorted(found.aliases))
    )
