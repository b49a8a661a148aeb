"""The report of a night, rendered and sealed."""

from contextlib import suppress

from expunge.batch.training import CURVES
from expunge.errors import NotFoundError, StorageError
from expunge.logs import get_logger
from expunge.registry.tracking import Tracker
from expunge.requests.blobs import BlobStore, open_blobs
from expunge.runs.outcomes import JobOutcome, NightPlan
from expunge.settings import Settings
from expunge.types import RemovalBatch


def seal_report(
    settings: Settings, tracker: Tracker, batch: RemovalBatch, planned: NightPlan, outcomes: tuple[JobOutcome, ...]
) -> str:
    """Render the report and seal it; return its blob id."""
    from expunge.evaluation.report import ReportBatch, ReportJob, render_report

    blobs = open_blobs(settings)
    jobs = [
        ReportJob(
            job=outcome.job,
            evidence=outcome.evidence,
            version=outcome.version,
            steps=outcome.steps,
            curves=_curves(tracker, outcome.run_id) if outcome.run_id else {},
            pictures=_pictures(blobs, outcome.evidence.pictures),
        )
        for outcome in outcomes
        if outcome.evidence
    ]
    failures = {**planned.refused, **planned.held}
    for outcome in outcomes:
        if outcome.error:
            failures |= {request.id: outcome.error for request in outcome.job.requests}
    return blobs.put(render_report(ReportBatch(batch=batch, jobs=tuple(jobs), failures=failures)))


def _curves(tracker: Tracker, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Return the run's curves, or none if the run is gone, which must not cost the night its report."""
    with suppress(NotFoundError):
        return tracker.curves(run_id, CURVES)
    return {}


def _pictures(blobs: BlobStore, named: dict[str, str]) -> dict[str, bytes]:
    """Return the pictures that can be read: a lost one must not cost the night its report."""
    found = {}
    for name, blob in named.items():
        try:
            found[name] = blobs.get(blob)
        except (NotFoundError, StorageError) as error:
            get_logger("batch").warning("the report lacks a picture", of=name, why=error.message)
    return found
