"""Register a job's hotfix as a version of its model, and promote it if its evidence allows."""

import math
import re
from collections.abc import Collection

from expunge.batch.training import CURVES
from expunge.batch.webhooks import settle_unconfirmed
from expunge.errors import NotFoundError
from expunge.evaluation.gate import REPRODUCTION
from expunge.evaluation.rotation import record_verified
from expunge.registry.artifacts import ledger
from expunge.registry.tracking import Tracker
from expunge.registry.uploading import register
from expunge.registry.versions import champion, promote
from expunge.requests.blobs import BlobStore, DamagedBlobError
from expunge.requests.leases import lease
from expunge.requests.outbox import Notice
from expunge.requests.store import RequestStore
from expunge.runs.job import JobFolder
from expunge.runs.locks import promotion_lock
from expunge.types import UNRELATED, Evidence, Ledger, ModelVersion, RequestState, UnlearnJob

MEASURED = {"psnr", "psnr_unrelated", "ssim", "ssim_unrelated", "kid", "kid_floor"}
"""The figures of unrelated outputs that every protocol has."""


def register_version(folder: JobFolder, tracker: Tracker, run_id: str, blobs: BlobStore) -> ModelVersion:
    """Register the job's hotfix with its evidence, and log the figures and pictures of the whole job to its run."""
    from expunge.evaluation.pictures import curves

    job, hotfix, evidence = folder.job.expect(), folder.hotfix.expect(), folder.evidence.expect()
    tracker.log_metrics(run_id, hotfix.steps, _figures(evidence))
    tracker.log_artifact_bytes(run_id, "curves.svg", curves(tracker.curves(run_id, CURVES), "training"))
    unrelated = evidence.pictures.get(UNRELATED)
    if unrelated is not None and all_open(blobs, unrelated):  # a lost picture must not cost a training
        picture = blobs.get(unrelated)
        kind = "jpg" if picture[:2] == b"\xff\xd8" else "png"
        tracker.log_artifact_bytes(run_id, f"unrelated.{kind}", picture)
    stands = evidence.passed | evidence.kept(job.ledger)
    removed = [request.id for request in job.everything if request.id in stands]
    before = ledger(tracker, job.model)
    night = before.night + 1
    return register(
        tracker,
        job=job,
        hotfix=hotfix,
        evidence=evidence,
        run_id=run_id,
        batch_id=job.batch,
        ledger=Ledger(
            model=job.model,
            version=None,
            requests=tuple(removed),
            night=night,
            verified=record_verified(removed, before.verified, night=night, proven=evidence.passed),
        ),
        key=blobs.derive("ledger"),
    )


def promote_version(folder: JobFolder, tracker: Tracker, store: RequestStore) -> bool:
    """Make the job's version the champion unless that would undo a removal; return whether it is the champion.

    The version of a replay is not: a person decides when another base model is served.

    It would if the champion has changed since the job was planned, because another night has then promoted removals
    that this version lacks. It would, too, if the store calls a request removed that this version does not remove.
    """
    job, evidence, version = folder.job.expect(), folder.evidence.expect(), folder.version.expect()
    if job.replay:
        return False
    with lease(store, promotion_lock(job.model), wait=True) as held:
        now = champion(tracker, job.model)
        current = now.uri if now else None
        removed = store.ids(RequestState.REMOVED, [job.model]).get(job.model, [])
        if not _promotable(job, evidence, removed) or current not in (job.warm_start, version.uri):
            return False
        settle_unconfirmed(store, tracker, job.model)
        if current == version.uri:  # promoted before this was killed
            return True
        notice = Notice("promotion", job.model, version.version, now.version if now else None)
        new = [request.id for request in job.requests if request.id in evidence.passed]
        number = store.note(new, f"promotion of {version.uri} over {current or 'no champion'} by its night", notice)
        held.check()
        promote(tracker, version)
        if number is not None:
            store.confirm(number)
        return True


def all_open(blobs: BlobStore, *ids: str) -> bool:
    """Return whether all these blobs are there and intact. Raises StorageError if the store fails."""
    try:
        return all(map(blobs.get, ids))
    except (NotFoundError, DamagedBlobError):
        return False


def _promotable(job: UnlearnJob, evidence: Evidence, removed: Collection[str]) -> bool:
    """Return whether unrelated outputs are intact, no earlier removal resurfaced, and something new is removed.

    Nothing passes without evidence about unrelated outputs. A request that the base model does not reproduce is no
    removal, so it never gives a reason to promote, and never stands against it.
    """
    earlier = {*removed, *(request.id for request in job.ledger)}
    tonight = {request.id for request in job.requests}
    return earlier <= evidence.passed | evidence.kept(job.ledger) and bool(tonight & evidence.passed)


def _figures(evidence: Evidence) -> dict[str, float]:
    """Return the whole job's figures for MLflow; those of single requests are in the version's evidence.json.

    `forgetting/worst_excess` is the highest upper bound of what is left of a target, as a share of the base model's.
    """
    requests = evidence.requests
    shifts = [r.shift.after for r in requests if r.shift]
    excess = [rule.bound for r in requests for rule in r.rules if rule.name == REPRODUCTION and rule.bound is not None]
    figures = {
        "forgetting/passed": float(len(evidence.passed)),
        "forgetting/not_reproduced": float(sum(r.verdict == "not_reproduced" for r in requests)),
    }
    if shifts:
        figures["forgetting/shift_mean"] = sum(shifts) / len(shifts)
    if excess:
        figures["forgetting/worst_excess"] = max(excess)
    integrity = evidence.integrity
    if integrity is not None:
        named = {**integrity.model_dump(include=MEASURED), **integrity.figures}
        # MLflow takes few characters in a name, and an encoder's may be a path.
        figures |= {f"integrity/{re.sub(r'[^A-Za-z0-9_ .-]', '_', name)}": value for name, value in named.items()}
    return {name: value for name, value in figures.items() if math.isfinite(value)}
