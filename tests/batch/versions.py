"""A version in the registry without a training: what a job would have registered."""

from pathlib import Path

from expunge.registry.tracking import Tracker
from expunge.registry.uploading import register
from expunge.requests.blobs import open_blobs
from expunge.settings import load_settings
from expunge.types import Evidence, Hotfix, Ledger, ModelVersion, UnlearnJob


def registered(job: UnlearnJob, evidence: Evidence, tracker: Tracker, folder: Path) -> ModelVersion:
    """Register a hotfix of the job, whose weights are made in `folder`, with all of its requests as the ledger."""
    folder.mkdir(exist_ok=True)
    (folder / "weights.safetensors").write_bytes(b"weights")
    return register(
        tracker,
        job=job,
        hotfix=Hotfix(job=job.id, kind="full", path=folder, steps=1, digest="0"),
        evidence=evidence,
        run_id=tracker.ensure_run(job.model, job.id, params={}, tags={}),
        batch_id=job.batch,
        ledger=Ledger(model=job.model, version=None, requests=tuple(request.id for request in job.requests)),
        key=open_blobs(load_settings()).derive("ledger"),
    )
