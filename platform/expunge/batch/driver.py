"""The driver of a night: drain, plan, take each job through prepare, train, evaluate, register and gate, then report.

It may be killed at any moment and started again: every stage leaves its output in the job's folder, a finished stage is
not run again, and what a stage does elsewhere (checkpoints, the registry, the request store) is idempotent.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from expunge.batch.faults import is_platforms, reason
from expunge.batch.job import run_job
from expunge.batch.lost import WHY, lost_removals
from expunge.batch.metrics import report_outcomes, report_queue
from expunge.batch.plan import plan_night
from expunge.batch.purging import purge_due, replayable
from expunge.batch.queue import capacity
from expunge.batch.report import seal_report
from expunge.batch.settle import settle
from expunge.batch.webhooks import deliver_what_waits
from expunge.errors import ExpungeError, NotFoundError
from expunge.evaluation.rotation import due_for_verification
from expunge.families import source_digest
from expunge.logs import get_logger
from expunge.registry.artifacts import DamagedVersionError, base_of, ledger
from expunge.registry.tracking import Tracker
from expunge.registry.versions import champion
from expunge.requests.blobs import open_blobs
from expunge.requests.home import check_home, remember
from expunge.requests.leases import Lease, lease
from expunge.requests.store import MAX_STARTS, RequestStore, open_store
from expunge.runs.document import LostError
from expunge.runs.job import JobFolder
from expunge.runs.locks import PATIENCE_S, batch_lock
from expunge.runs.night import NightFolder, how_to_continue, refuse_replay
from expunge.runs.outcomes import JobOutcome, NightOutcome, NightPlan
from expunge.settings import Settings
from expunge.types import ModelVersion, RemovalBatch, RemovalRequest, RequestState, UnlearnJob

RELEASED = "its undecided requests are back in the queue: run `expunge night`"


class Unfinished(ExpungeError):
    """The platform failed a job: the batch stays open, and its finished stages are kept for the next run."""


def run_night(
    settings: Settings, batch_id: str | None = None, models: list[str] | None = None, home: str | None = None
) -> NightOutcome | None:
    """Run or continue a night on the Ray that this process is connected to; return None if no request waits.

    home: the id of the home that the night was submitted from; this process must have the same. A job that fails sends
    its requests back to the queue with the reason and delays no other job. Raises Unfinished if the platform failed a
    job.
    """
    log = get_logger("batch")
    if batch_id is not None:
        refuse_replay(batch_id)
    if home is not None:
        check_home(settings, home)
    store, tracker = open_store(settings, patience=PATIENCE_S), Tracker(settings.tracking)
    fits = capacity(store, settings, _cluster)
    batch = store.drain(batch_id, models, settings.night_limit, choose=fits.choose if fits else None)
    report_queue(store, settings)
    if not batch.requests and not lost_removals(store, tracker, models):
        log.info("nothing waits", batch=batch.id)
        return None

    def plan(batch: RemovalBatch) -> NightPlan:
        return _plan(settings, store, tracker, batch)

    return drive(settings, store, tracker, batch, plan, complete=partial(_with_lost, store, tracker, models=models))


def drive(
    settings: Settings,
    store: RequestStore,
    tracker: Tracker,
    batch: RemovalBatch,
    plan: Callable[[RemovalBatch], NightPlan],
    *,
    complete: Callable[[RemovalBatch, NightFolder], RemovalBatch] | None = None,
) -> NightOutcome:
    """Run or continue a batch by its plan, which is made once; complete: adds requests to the batch before that.

    Raises as `run_night` does.
    """
    log, folder = get_logger("batch"), NightFolder(settings.runs / batch.id)
    with lease(store, batch_lock(batch.id)) as held:
        if store.has_ended(batch.id):
            return _verdicts(folder)
        folder.mark_format()
        try:
            starts = _count_start(store, batch, folder)
            batch = complete(batch, folder) if complete else batch
            return _run(settings, store, tracker, batch, folder, plan, starts, held)
        except Exception as error:
            if isinstance(error, Unfinished) or is_platforms(error):
                raise
            # Another try would end the same way, and delay the requests behind it.
            store.release_batch(batch.id, f"the night ended with an error: {reason(error)}")
            if isinstance(error, ExpungeError):
                raise
            log.exception("the night ended with an error", batch=batch.id)
            raise ExpungeError(f"batch {batch.id}: {reason(error)}", hint=RELEASED) from error


def _cluster() -> tuple[int, int]:
    """Return how many GPUs and CPU cores Ray has."""
    has = ray.cluster_resources()
    return int(has.get("GPU", 0)), int(has.get("CPU", 0))


def _verdicts(folder: NightFolder) -> NightOutcome:
    """Return the outcome of a batch that has ended, assembled again if its file is lost.

    The batch is never run twice, because its requests have moved on. Raises NotFoundError if the batch was given up or
    a stage's output is lost, and names the file.
    """
    folder.check_format()
    try:
        return folder.restore()
    except LostError as error:
        message = f"batch {folder.id} has ended but has no verdicts ({error.message})"
        raise NotFoundError(message, hint=RELEASED) from None


def _count_start(store: RequestStore, batch: RemovalBatch, folder: NightFolder) -> int:
    """Count this start of the batch, before anything that may kill the process, and return the number of starts.

    A batch that kills every driver is thus given up, too. Raises ExpungeError after MAX_STARTS without progress.
    """
    if not batch.requests:  # a batch that is only there for lost removals, or a replay, which a person starts
        return 1
    starts = store.start_batch(batch.id, folder.advance())
    if starts > MAX_STARTS:
        raise ExpungeError(
            f"batch {batch.id} was started {MAX_STARTS} times without getting any further", hint=RELEASED
        )
    return starts


def _with_lost(
    store: RequestStore, tracker: Tracker, batch: RemovalBatch, folder: NightFolder, *, models: list[str] | None
) -> RemovalBatch:
    """Add removed requests that no champion holds; only before planning, because a plan is never changed."""
    if folder.has_plan:
        return batch
    lost = lost_removals(store, tracker, models)
    if not lost:
        return batch
    for model, requests in lost.items():
        get_logger("batch").warning(WHY, model=model, requests=requests)
    store.resurface(batch.id, [request for requests in lost.values() for request in requests], WHY)
    return store.drain(batch.id)


def _run(
    settings: Settings,
    store: RequestStore,
    tracker: Tracker,
    batch: RemovalBatch,
    folder: NightFolder,
    plan: Callable[[RemovalBatch], NightPlan],
    starts: int,
    held: Lease,
) -> NightOutcome:
    log = get_logger("batch")
    planned = folder.plan_once(lambda: plan(batch))
    log.info(
        "planned",
        batch=batch.id,
        requests=len(batch.requests),
        jobs=[job.id for job in planned.jobs],
        refused=list(planned.refused),
        held=list(planned.held),
    )
    outcomes = tuple(_confirmed(outcome, tracker) for outcome in _run_jobs(settings, planned, folder))
    for outcome in outcomes:
        log.info("job ended", batch=batch.id, job=outcome.job.id, error=outcome.error, passed=sorted(outcome.passed))

    held.check()
    failed = [outcome for outcome in outcomes if outcome.platform]
    last = starts >= MAX_STARTS
    settle(store, settings, batch, planned, outcomes if last else [o for o in outcomes if not o.platform])
    report_outcomes(outcomes)
    report_queue(store, settings)
    if failed and not last:
        raise Unfinished(f"job {failed[0].job.id}: {failed[0].error}", hint=how_to_continue(batch.id))
    if not store.batch(batch.id).report:
        store.set_report(batch.id, seal_report(settings, tracker, batch, planned, outcomes))
    night = folder.finish(planned, outcomes)
    store.close_batch(batch.id)
    deliver_what_waits(settings, store, tracker)
    purge_due(settings, store, open_blobs(settings))
    return night


def _undecided(store: RequestStore, batch: RemovalBatch) -> RemovalBatch:
    """Drop requests that have left the batch: a second plan must not repeat what the first one decided."""
    batched = store.list(batch=batch.id, state=RequestState.BATCHED, history=False)
    mine = {record.request.id for record in batched if record.batch == batch.id}
    return batch.model_copy(update={"requests": tuple(r for r in batch.requests if r.id in mine)})


def _confirmed(outcome: JobOutcome, tracker: Tracker) -> JobOutcome:
    """Check a promotion again: between two starts of a night the version may have been rolled back or lost."""
    if outcome.version is None or not outcome.promoted:
        return outcome
    return outcome.with_promotion(outcome.passed <= {*ledger(tracker, outcome.job.model).requests})


def _run_jobs(settings: Settings, planned: NightPlan, folder: NightFolder) -> tuple[JobOutcome, ...]:
    """Run all jobs at once; Ray starts each when its resources are free.

    The tasks themselves only wait, so they reserve no CPU. They stay on the driver's node, because the night cannot go
    on without that node anyway.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    home = remember(settings).id
    running = {
        job.id: run_job.options(name=job.id, scheduling_strategy=here).remote(folder.job(job.id), home)
        for job in planned.jobs
    }
    return tuple(_outcome(job, folder.job(job.id), running[job.id]) for job in planned.jobs)


def _plan(settings: Settings, store: RequestStore, tracker: Tracker, batch: RemovalBatch) -> NightPlan:
    """Plan the night; earlier removals are verified in turn."""
    last = cache(partial(ledger, tracker))

    def removed(model: str) -> tuple[ModelVersion | None, list[RemovalRequest]]:
        return champion(tracker, model), replayable(store, last(model).requests)

    def due(model: str, earlier: Sequence[str]) -> tuple[str, ...]:
        now, share = last(model), settings.evaluation.ledger_share
        other = _has_other_base(champion(tracker, model), settings, tracker)
        return due_for_verification(
            earlier, now.verified, night=now.night + 1, batch=batch.id, share=share, everything=other
        )

    return plan_night(_undecided(store, batch), settings, removed, due)


def _has_other_base(current: ModelVersion | None, settings: Settings, tracker: Tracker) -> bool:
    """Return whether the champion was trained from other files than the model has: nothing is proven on those."""
    if current is None:
        return False
    try:
        base = base_of(tracker, current)
    except DamagedVersionError:  # whatever it was trained from, its record of verifications is worth nothing
        return True
    return base is not None and base != source_digest(settings.model(current.name))


def _outcome(job: UnlearnJob, folder: JobFolder, ended: "ray.ObjectRef[None]") -> JobOutcome:
    """Read the outcome from the job's folder: its task returns nothing, so that no request passes through Ray."""
    try:
        ray.get(ended)
        return folder.outcome_of(job)
    except Exception as error:  # Ray's, the task's own, or a LostError
        return JobOutcome(job=job, error=reason(error), platform=is_platforms(error))
