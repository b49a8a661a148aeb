"""The driver of a night: drain, plan, then each job through prepare, train, evaluate, register, gate; then the report.

It may be killed at any moment and started again: every stage leaves its output in the job's folder, a finished stage is
not run again, and what a stage does outside of its folder (checkpoints, the registry, the request store) is idempotent.
"""

from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from expunge.batch.faults import is_platforms, reason
from expunge.batch.job import CURVES, PATIENCE_S, run_job
from expunge.batch.lost import WHY, lost_removals
from expunge.batch.metrics import report_outcomes, report_queue
from expunge.batch.outcome import JobOutcome, NightOutcome, settle
from expunge.batch.plan import LedgerOf, Plan, plan
from expunge.batch.stages import NIGHT, OUTCOME, PLAN, advance, once, only_driver, stored
from expunge.errors import ExpungeError, NotFoundError, StorageError
from expunge.logs import get_logger
from expunge.registry.tracking import Tracker
from expunge.registry.versions import champion, ledger
from expunge.requests.blobs import BlobStore, open_blobs
from expunge.requests.home import check_home, remember
from expunge.requests.store import MAX_STARTS, RequestStore, open_store
from expunge.settings import Settings
from expunge.unlearning.folder import JOB
from expunge.words import ModelVersion, RemovalBatch, RemovalRequest, UnlearnJob


class Unfinished(ExpungeError):
    """The platform has failed a job: the batch stays open, and what was done is kept for whoever continues it."""


def run_night(
    settings: Settings, batch_id: str | None = None, models: list[str] | None = None, home: str | None = None
) -> NightOutcome | None:
    """Run or continue a night on the Ray that this process is connected to; None where nothing waits.

    home: the id of the home that the night was submitted from; another one here is refused. A job that fails sends its
    requests back to the queue with the reason and holds no other job up. Raises Unfinished where the platform has
    failed a job.
    """
    log = get_logger("batch")
    if home is not None:
        check_home(settings, home)
    store, tracker = open_store(settings, patience=PATIENCE_S), Tracker(settings.tracking)
    batch = store.drain(batch_id, models, settings.night_limit)
    report_queue(store, settings)
    if not batch.requests and not lost_removals(store, tracker, models):
        log.info("nothing waits", batch=batch.id)
        return None
    folder = settings.runs / batch.id
    with only_driver(folder, batch.id):
        try:
            batch = _with_lost(store, tracker, batch, folder, models)
            return _run(settings, store, tracker, batch, folder)
        except Exception as error:
            # Anything else would end the same way the next time, and hold up what waits behind it.
            if not isinstance(error, Unfinished) and not is_platforms(error):
                store.release_batch(batch.id, f"the night ended with an error: {reason(error)}")
            raise


def _with_lost(
    store: RequestStore, tracker: Tracker, batch: RemovalBatch, folder: Path, models: list[str] | None
) -> RemovalBatch:
    """The batch, and in it what is `removed` by no champion: before it is planned, as a plan is never changed."""
    if (folder / PLAN).exists():
        return batch
    lost = lost_removals(store, tracker, models)
    if not lost:
        return batch
    for model, requests in lost.items():
        get_logger("batch").warning(WHY, model=model, requests=requests)
    store.resurface(batch.id, [request for requests in lost.values() for request in requests], WHY)
    return store.drain(batch.id)


def _run(settings: Settings, store: RequestStore, tracker: Tracker, batch: RemovalBatch, folder: Path) -> NightOutcome:
    log = get_logger("batch")
    finished = stored(folder / NIGHT, NightOutcome)
    if finished is not None and store.batch(batch.id).closed:
        return finished
    starts = store.start_batch(batch.id, advance(folder))
    if starts > MAX_STARTS:
        raise ExpungeError(
            f"batch {batch.id} was started {MAX_STARTS} times without getting any further",
            hint="its requests are back in the queue: run `expunge night`",
        )
    planned = once(folder / PLAN, Plan, lambda: plan(batch, settings, _ledger_of(store, tracker)))
    log.info(
        "planned",
        batch=batch.id,
        requests=len(batch.requests),
        jobs=[job.id for job in planned.jobs],
        refused=list(planned.refused),
        held=list(planned.held),
    )
    outcomes = _run_jobs(settings, planned, folder)
    for outcome in outcomes:
        log.info("job ended", batch=batch.id, job=outcome.job.id, error=outcome.error, passed=sorted(outcome.passed))

    failed = [outcome for outcome in outcomes if outcome.platform]
    last = starts >= MAX_STARTS
    settle(store, settings, batch, planned, outcomes if last else [o for o in outcomes if not o.platform])
    report_outcomes(outcomes)
    report_queue(store, settings)
    if failed and not last:
        raise Unfinished(
            f"job {failed[0].job.id}: {failed[0].error}", hint=f"run `expunge night --batch {batch.id}` to continue"
        )
    if not store.batch(batch.id).report:
        store.set_report(batch.id, _report(settings, tracker, batch, planned, outcomes))
    store.close_batch(batch.id)
    night = NightOutcome(**{name: getattr(planned, name) for name in Plan.model_fields}, outcomes=outcomes)
    return once(folder / NIGHT, NightOutcome, lambda: night)


def _run_jobs(settings: Settings, planned: Plan, folder: Path) -> tuple[JobOutcome, ...]:
    """All at once: Ray starts each as its resources come free. The tasks themselves only wait: they ask for no CPU, and
    stay on the driver's node, without which there is no night anyway.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    home = remember(settings).id
    for job in planned.jobs:
        once(folder / job.id / JOB, UnlearnJob, lambda job=job: job)
    running = {
        job.id: run_job.options(name=job.id, scheduling_strategy=here).remote(folder / job.id, home)
        for job in planned.jobs
    }
    return tuple(_outcome(job, folder / job.id, running[job.id]) for job in planned.jobs)


def _ledger_of(store: RequestStore, tracker: Tracker) -> LedgerOf:
    def of(model: str) -> tuple[ModelVersion | None, list[RemovalRequest]]:
        return champion(tracker, model), [store.get(request).request for request in ledger(tracker, model).requests]

    return of


def _outcome(job: UnlearnJob, folder: Path, ended: "ray.ObjectRef[None]") -> JobOutcome:
    """What the job has left in its folder; its task returns nothing, as Ray must not carry what requests say."""
    try:
        ray.get(ended)
        left = stored(folder / OUTCOME, JobOutcome)
    except Exception as error:  # Ray's, or the task's own
        return JobOutcome(job=job, error=reason(error), platform=is_platforms(error))
    return left or JobOutcome(job=job, error=f"{folder / OUTCOME} was written and is not there", platform=True)


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
            pictures=_pictures(blobs, outcome.evidence.pictures),
        )
        for outcome in outcomes
        if outcome.evidence and outcome.run_id
    ]
    failures = {**planned.refused, **planned.held}
    for outcome in outcomes:
        if outcome.error:
            failures |= {request.id: outcome.error for request in outcome.job.requests}
    return blobs.put(render_report(ReportBatch(batch=batch, jobs=tuple(jobs), failures=failures)))


def _pictures(blobs: BlobStore, named: dict[str, str]) -> dict[str, bytes]:
    """Those that there are: a picture that is lost must not cost the night its report."""
    found = {}
    for name, blob in named.items():
        try:
            found[name] = blobs.get(blob)
        except (NotFoundError, StorageError) as error:
            get_logger("batch").warning("the report lacks a picture", of=name, why=error.message)
    return found
