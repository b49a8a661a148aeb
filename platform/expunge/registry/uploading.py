"""Register a hotfix: its files are uploaded and sealed, then its version appears, then it becomes the candidate.

A version's files never change. If it is verified again later, the newer ledger and evidence lie in a sealed folder of
their own, `verification/JOB`.
"""

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from expunge.errors import InputError
from expunge.registry import seals
from expunge.registry.flavor import write_flavor
from expunge.registry.seals import EVIDENCE, LEDGER
from expunge.registry.tracking import JOB_TAG, Tracker
from expunge.registry.versions import (
    BATCH_TAG,
    CANDIDATE,
    FOLDER,
    LOOSENED_TAG,
    PASSED_TAG,
    REQUESTS_TAG,
    SEAL_TAG,
    TAG_LENGTH,
    VERIFICATION_TAG,
    VERIFICATIONS,
    by_alias,
    ensure_model,
    find,
    fresh,
    set_alias,
)
from expunge.requests.audit import release
from expunge.types import Evidence, Hotfix, Ledger, ModelVersion, UnlearnJob

SHOWN = ("source", "base", "kind", "digest", "release", "protocol")
"""What `MLmodel` repeats of `expunge.json`, for whoever reads the registry without Expunge."""


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
    found = find(tracker, job)
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
        ensure_model(tracker, job.model)
        with tracker.reaching():
            found = tracker.client.create_model_version(job.model, source, run_id, tags=tags)
    newest = by_alias(tracker, job.model, CANDIDATE)
    if newest is None or int(newest.version) < int(found.version):
        set_alias(tracker, job.model, CANDIDATE, found.version)
    return fresh(tracker, job.model, found.version)


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
