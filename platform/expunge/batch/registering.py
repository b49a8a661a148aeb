"""A job's hotfix becomes a version of its model, and the champion where its evidence allows."""

from collections.abc import Collection
from contextlib import closing

from expunge.batch.training import CURVES
from expunge.errors import NotFoundError
from expunge.registry.tracking import Tracker
from expunge.registry.versions import champion, promote, register
from expunge.requests.blobs import BlobStore, DamagedBlobError
from expunge.requests.store import open_store
from expunge.runs.job import JobFolder
from expunge.runs.locks import PATIENCE_S, hold, promotion_lock
from expunge.settings import Settings
from expunge.words import Evidence, Ledger, ModelVersion, RequestState, UnlearnJob


def register_version(folder: JobFolder, tracker: Tracker, run_id: str, blobs: BlobStore) -> ModelVersion:
    """Register the job's hotfix with its evidence, and log to the job's run what belongs to no single request."""
    from expunge.evaluation.pictures import curves

    job, hotfix, evidence = folder.job.expect(), folder.hotfix.expect(), folder.evidence.expect()
    tracker.log_metrics(run_id, hotfix.steps, _figures(evidence))
    tracker.log_artifact_bytes(run_id, "curves.svg", curves(tracker.curves(run_id, CURVES), "training"))
    unrelated = evidence.pictures["unrelated"]
    if all_open(blobs, unrelated):  # a picture that is lost must not cost a training
        tracker.log_artifact_bytes(run_id, "unrelated.png", blobs.get(unrelated))
    removed = [request.id for request in job.everything if request.id in evidence.passed]
    return register(
        tracker,
        job=job,
        hotfix=hotfix,
        evidence=evidence,
        run_id=run_id,
        batch_id=job.batch,
        ledger=Ledger(model=job.model, version=None, requests=tuple(removed)),
    )


def promote_version(folder: JobFolder, tracker: Tracker, settings: Settings) -> bool:
    """Make the job's version the champion, unless the champion is another one than the job was planned to build on.

    Then another night has promoted a removal that this version does not hold: promoting would undo it. So would
    promoting over anything that the store calls removed and this version does not remove. Returns whether the version
    is the champion.
    """
    job, evidence, version = folder.job.expect(), folder.evidence.expect(), folder.version.expect()
    store = open_store(settings, patience=PATIENCE_S)
    with closing(store), hold(settings, promotion_lock(job.model), wait=True) as lease:
        now = champion(tracker, job.model)
        current = now.uri if now else None
        removed = store.ids(RequestState.REMOVED, [job.model]).get(job.model, [])
        if not _promotable(job, evidence, removed) or current not in (job.warm_start, version.uri):
            return False
        lease.check()
        promote(tracker, version)
        return True


def all_open(blobs: BlobStore, *ids: str) -> bool:
    """Whether none of these blobs is gone or damaged. Raises StorageError where the store fails."""
    try:
        return all(map(blobs.get, ids))
    except (NotFoundError, DamagedBlobError):
        return False


def _promotable(job: UnlearnJob, evidence: Evidence, removed: Collection[str]) -> bool:
    """Whether unrelated outputs stayed, nothing removed earlier resurfaced, and the version removes something new."""
    earlier = {*removed, *(request.id for request in job.ledger)}
    tonight = {request.id for request in job.requests}
    return evidence.integrity.passed and earlier <= evidence.passed and bool(tonight & evidence.passed)


def _figures(evidence: Evidence) -> dict[str, float]:
    """Return numbers of the whole job for MLflow; those of single requests are in the version's evidence.json."""
    integrity = evidence.integrity.model_dump(exclude={"passed", "why"})
    shifts = [r.shift.after for r in evidence.requests if r.shift]
    return {
        **{f"integrity/{name}": value for name, value in integrity.items()},
        "forgetting/shift_mean": sum(shifts) / max(1, len(shifts)),
        "forgetting/passed": float(len(evidence.passed)),
    }
