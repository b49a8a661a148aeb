"""Verify a registered version again, with its whole ledger: before a person promotes it."""

import hashlib
import json
from pathlib import Path

from expunge.batch.purging import replayable
from expunge.batch.registering import all_open
from expunge.errors import InputError, NotFoundError
from expunge.evaluation.rotation import due_for_verification, record_verified
from expunge.evaluation.rules import PROTOCOL_VERSION
from expunge.families import pinned_source, source_digest
from expunge.registry.artifacts import ledger
from expunge.registry.ledgers import Contents
from expunge.registry.seals import ABOUT
from expunge.registry.tracking import Tracker
from expunge.requests.blobs import BlobStore
from expunge.requests.leases import lease
from expunge.requests.store import RequestStore
from expunge.runs.formats import read_training
from expunge.runs.job import JobFolder
from expunge.runs.locks import job_lock
from expunge.runs.night import NightFolder
from expunge.settings import Settings
from expunge.types import Evidence, Hotfix, Ledger, ModelVersion, UnlearnJob


def is_verified(found: Contents, settings: Settings) -> bool:
    """Return whether the version's evidence covers its whole ledger under the gate that is in force."""
    evidence = found.evidence
    gate = settings.gate_for(found.version.name).model_dump(exclude={"max_attempts"})
    judged = {each.request for each in evidence.requests}
    return (
        evidence.integrity is not None
        and evidence.protocol_version == PROTOCOL_VERSION
        and evidence.basis is not None
        and not evidence.basis.loosened
        and evidence.basis.gate == gate
        and judged >= {*found.ledger.requests}
    )


def check_base(version: ModelVersion, weights: Path, settings: Settings, *, files: bool = False) -> None:
    """Raise InputError if the version was trained from another base model than its model has in the settings.

    The next night would start from the other one again, and undo the promotion of this version. files: look at the
    files even where the source is the same; they may have been exchanged, and are not everywhere at hand.
    """
    about, options = json.loads((weights / ABOUT).read_bytes()), settings.model(version.name)
    if about["source"] == pinned_source(options) and not files:
        return
    if about.get("base") not in (None, source_digest(options)):
        raise InputError(
            f"{version.uri} was trained from other files than those of model {version.name}",
            hint=f"set models.{version.name}.source to the base model that it was trained from",
        )


def unproven(found: Contents, evidence: Evidence) -> tuple[str, ...]:
    """Return the requests of the version's ledger that this evidence does not show to be removed."""
    shown = evidence.passed | {each.request for each in evidence.requests if each.verdict == "not_reproduced"}
    return tuple(id for id in found.ledger.requests if id not in shown)


def verify_again(found: Contents, weights: Path, settings: Settings, store: RequestStore, blobs: BlobStore) -> Evidence:
    """Evaluate the version in `weights` with every request of its ledger; a second call goes on where one was killed.

    It loads the model into this process. The pictures that training did not see are those of its own night. Raises
    InputError if the base model is another one by now, and NotFoundError if the store lacks a request.
    """
    from expunge.batch.judging import prepare_judged
    from expunge.evaluation.measure import measure

    job, hotfix = _job(found, weights, settings, store)
    folder = _folder(found, job, settings)

    with lease(store, job_lock(job.id), wait=True):
        NightFolder(folder.path.parent).mark_format()
        folder.job.once(lambda: job)
        folder.weights.unlink(missing_ok=True)
        folder.weights.symlink_to(weights)
        folder.hotfix.write(hotfix)
        folder.prepared.once(
            lambda: prepare_judged(folder, settings, blobs), valid=lambda prepared: all_open(blobs, *prepared.tensors)
        )
        return folder.evidence.once(lambda: measure(folder, settings, blobs))


def ledger_after(tracker: Tracker, found: Contents, evidence: Evidence) -> Ledger:
    """Return what the version removes by this evidence, all of it verified at its promotion."""
    before, lost = ledger(tracker, found.version.name), unproven(found, evidence)
    night = before.night + (before.version != found.version.version)
    left = tuple(id for id in found.ledger.requests if id not in lost)
    verified = record_verified(left, before.verified, night=night, proven=evidence.passed)
    return Ledger(model=found.version.name, version=None, requests=left, night=night, verified=verified)


def _job(found: Contents, weights: Path, settings: Settings, store: RequestStore) -> tuple[UnlearnJob, Hotfix]:
    check_base(found.version, weights, settings, files=True)
    about = json.loads((weights / ABOUT).read_bytes())
    model, version = found.version.name, found.version
    try:
        earlier = tuple(replayable(store, found.ledger.requests))
    except NotFoundError as error:
        raise NotFoundError(f"{version.uri} cannot be verified: {error.message}", hint="restore the database") from None
    ids = [request.id for request in earlier]
    verify = due_for_verification(
        ids, found.ledger.verified, night=found.ledger.night, batch=version.uri, share=1.0, everything=True
    )
    job = UnlearnJob(
        batch=found.batch,
        model=model,
        source=about["source"],
        base=source_digest(settings.model(model)),
        resolution=about["resolution"],
        requests=(),
        ledger=earlier,
        verify=verify,
        training=read_training(about["training"]),
    )
    hotfix = Hotfix(job=job.id, kind=about["kind"], path=weights, steps=about["steps"], digest=about["digest"])
    return job, hotfix


def _folder(found: Contents, job: UnlearnJob, settings: Settings) -> JobFolder:
    """Return the folder of this verification: other settings of the evaluation make another one."""
    rules = settings.evaluation.model_dump_json() + settings.gate_for(found.version.name).model_dump_json()
    name = f"promotion-{hashlib.sha256(f'{found.version.uri} {rules}'.encode()).hexdigest()[:12]}"
    return JobFolder(settings.runs / name / job.id)
