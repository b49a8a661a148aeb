"""The driver of a night: drain, plan, then each job through prepare, train, evaluate, register, gate; then the report.

It may be killed at any moment and started again: every stage leaves its output in the job's folder, a finished stage is
not run again, and what a stage does outside of its folder (checkpoints, the registry, the request store) is idempotent.
"""

from pathlib import Path

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from expunge.batch.job import CURVES, run_job
from expunge.batch.metrics import report_outcomes, report_queue
from expunge.batch.outcome import JobOutcome, NightOutcome, settle
from expunge.batch.plan import LedgerOf, Plan, plan
from expunge.batch.stages import PLAN, once, only_driver
from expunge.errors import ExpungeError, last_line
from expunge.logs import get_logger
from expunge.registry.tracking import Tracker
from expunge.registry.versions import champion, ledger
from expunge.requests.blobs import open_blobs
from expunge.requests.store import RequestStore, open_store
from expunge.settings import Settings
from expunge.unlearning.folder import JOB
from expunge.words import ModelVersion, RemovalBatch, RemovalRequest, UnlearnJob


def run_night(settings: Settings, batch_id: str | None = None, models: list[str] | None = None) -> NightOutcome | None:
    """Run or continue a night on the Ray that this process is connected to; None where nothing waits.

    A failing job sends its requests back to the queue with the reason and holds no other job up.
    """
    log = get_logger("batch")
    store, tracker = open_store(settings), Tracker(settings.tracking)
    batch = store.drain(batch_id, models)
    report_queue(store, settings)
    if not batch.requests:
        log.info("nothing waits", batch=batch.id)
        return None
    folder = settings.runs / batch.id
    with only_driver(folder, batch.id):
        return _run(settings, store, tracker, batch, folder)


def _run(settings: Settings, store: RequestStore, tracker: Tracker, batch: RemovalBatch, folder: Path) -> NightOutcome:
    log = get_logger("batch")
    planned = once(folder / PLAN, Plan, lambda: plan(batch, settings, _ledger_of(store, tracker)))
    log.info(
        "planned",
        batch=batch.id,
        requests=len(batch.requests),
        jobs=[job.id for job in planned.jobs],
        refused=list(planned.refused),
    )

    # Before anything is settled: a night that goes on after a kill must not run again what its requests were judged by.
    night = once(folder / "outcomes.json", NightOutcome, lambda: _run_jobs(planned, folder))
    for outcome in night.outcomes:
        log.info("job ended", batch=batch.id, job=outcome.job.id, error=outcome.error, passed=sorted(outcome.passed))

    settle(store, settings, batch, planned, night.outcomes)
    report_outcomes(night.outcomes)
    report_queue(store, settings)
    if not store.batch(batch.id).report:
        store.set_report(batch.id, _report(settings, tracker, batch, planned, night.outcomes))
    store.close_batch(batch.id)
    return once(folder / "night.json", NightOutcome, lambda: night)


def _run_jobs(planned: Plan, folder: Path) -> NightOutcome:
    """All at once: Ray starts each as its resources come free. The tasks themselves only wait: they ask for no CPU, and
    stay on the driver's node, without which there is no night anyway.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    for job in planned.jobs:
        once(folder / job.id / JOB, UnlearnJob, lambda job=job: job)
    running = {
        job.id: run_job.options(name=job.id, scheduling_strategy=here).remote(folder / job.id) for job in planned.jobs
    }
    outcomes = tuple(_outcome(job, running[job.id]) for job in planned.jobs)
    return NightOutcome(batch=planned.batch, jobs=planned.jobs, refused=planned.refused, outcomes=outcomes)


def _ledger_of(store: RequestStore, tracker: Tracker) -> LedgerOf:
    def of(model: str) -> tuple[ModelVersion | None, list[RemovalRequest]]:
        return champion(tracker, model), [store.get(request).request for request in ledger(tracker, model).requests]

    return of


def _outcome(job: UnlearnJob, reference: "ray.ObjectRef[str]") -> JobOutcome:
    try:
        return JobOutcome.model_validate_json(ray.get(reference))
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        return JobOutcome(job=job, error=str(cause) if isinstance(cause, ExpungeError) else last_line(cause))


def _report(
    settings: Settings, tracker: Tracker, batch: RemovalBatch, planned: Plan, outcomes: tuple[JobOutcome, ...]
) -> str:
    """Render the report and seal it; returns its blob id."""
    from expunge.evaluation.report import ReportBatch, ReportJob, render_report

    blobs = open_blobs(settings)
    jobs = [
        ReportJob(
            job=outcome.job,
            evidence=outcome.evidence,
            version=outcome.version,
            steps=outcome.steps,
            curves=tracker.curves(outcome.run_id, CURVES),
            pictures={name: blobs.get(blob) for name, blob in outcome.evidence.pictures.items()},
        )
        for outcome in outcomes
        if outcome.evidence and outcome.run_id
    ]
    failures = dict(planned.refused)
    for outcome in outcomes:
        if outcome.error:
            failures |= {request.id: outcome.error for request in outcome.job.requests}
    return blobs.put(render_report(ReportBatch(batch=batch, jobs=tuple(jobs), failures=failures)))
