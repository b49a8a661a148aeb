"""Versions that nobody can come back to: superseded candidates, which no gate and no person has promoted."""

from expunge.errors import NotFoundError
from expunge.registry.tracking import Tracker
from expunge.registry.versions import (
    BATCH_TAG,
    CANDIDATE,
    FOLDER,
    VERIFICATIONS,
    all_versions,
    former_champions,
    resolve,
)
from expunge.types import ModelVersion


def superseded(tracker: Tracker, model: str) -> list[tuple[ModelVersion, str]]:
    """Return the versions that may be deleted, oldest first, each with its batch.

    They are older than the candidate, have no alias, and were never the champion, so that a rollback cannot want them.
    """
    kept = former_champions(tracker, model)
    try:
        newest = int(resolve(tracker, f"models:/{model}@{CANDIDATE}").version)
    except NotFoundError:
        return []
    found = []
    for version in all_versions(tracker, model):
        number, batch = str(version.version), version.tags.get(BATCH_TAG)
        if int(number) >= newest or number in kept or batch is None:
            continue
        mine = resolve(tracker, f"models:/{model}/{number}")  # a search does not tell aliases on every store
        if not mine.aliases:
            found.append((mine, batch))
    return found


def delete(tracker: Tracker, version: ModelVersion) -> None:
    """Delete a version, then its files; its run keeps the figures. Raises StorageError if the files stay."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    with tracker.reaching():
        root = tracker.client.get_run(version.run_id).info.artifact_uri
        tracker.client.delete_model_version(version.name, version.version)
    assert root is not None
    with tracker.transferring():
        files = get_artifact_repository(root, tracking_uri=tracker.uri)
        there = {file.path for file in files.list_artifacts()}
        for name in (FOLDER, VERIFICATIONS):
            if name in there:
                files.delete_artifacts(name)
