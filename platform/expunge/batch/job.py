"""Run one job through its stages as a Ray task. Only the folder's path passes through Ray: no request does."""

import socket
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any

import ray

from expunge.batch.faults import cause_of, is_platforms, reason
from expunge.batch.metrics import timed
from expunge.batch.registering import all_open, promote_version, register_version
from expunge.batch.training import train_job
from expunge.errors import ExpungeError, InputError, UnavailableError
from expunge.families import source_digest
from expunge.generation.placement import resources
from expunge.logs import configure, get_logger
from expunge.registry.tracking import Tracker
from expunge.registry.versions import champion, version_of
from expunge.requests.blobs import open_blobs
from expunge.requests.home import check_home
from expunge.requests.leases import Lease, lease
from expunge.requests.store import RequestStore, open_store
from expunge.runs.document import Content, Document
from expunge.runs.job import JobFolder
from expunge.runs.locks import PATIENCE_S, job_lock
from expunge.runs.outcomes import JobEnd
from expunge.settings import Settings, load_settings
from expunge.types import PreparedJob, UnlearnJob


@ray.remote(num_cpus=0, max_retries=2)
def run_job(folder: JobFolder, home: str) -> None:
    """Run `walk_job` as a Ray task. Returns nothing, so that Ray carries only the folder's path."""
    walk_job(folder, home)


def walk_job(folder: JobFolder, home: str) -> None:
    """Run the remaining stages of the job in `folder`, and write there how it ended.

    An error of the job is written there, too. Only errors of the platform are raised; the job can then be continued.
    `home` is the id of the home that the night was submitted from.
    """
    settings = _settings(home)
    folder.check_format()
    # A task whose driver was killed may live on for a moment beside the one that replaces it.
    store = open_store(settings, patience=PATIENCE_S)
    with closing(store), lease(store, job_lock(folder.id), wait=True) as held:
        folder.end.once(lambda: _end(folder, settings, store, home, held), valid=lambda end: folder.outcome is not None)
    folder.progress("done")


def _end(folder: JobFolder, settings: Settings, store: RequestStore, home: str, held: Lease) -> JobEnd:
    job, tracker = folder.job.expect(), Tracker(settings.tracking)
    settings = job.within(settings)
    changed = _changed(job, settings, tracker)
    if changed:
        return JobEnd(error=changed, outdated=True)
    run_id = tracker.ensure_run(job.model, job.id, params=_params(job), tags=_tags(job))
    try:
        promoted = _walk(folder, settings, store, tracker, run_id, home, held)
        tracker.finish(run_id, "FINISHED")
    except Exception as error:  # libraries may raise anything over a model's files
        with suppress(ExpungeError):
            tracker.finish(run_id, "FAILED")
        if is_platforms(error):
            raise
        get_logger("batch").warning("the job failed", job=job.id, kind=type(cause_of(error)).__name__)
        changed = _changed(job, settings, tracker)
        return JobEnd(error=changed or reason(error), outdated=bool(changed))
    return JobEnd(promoted=promoted)


def _changed(job: UnlearnJob, settings: Settings, tracker: Tracker) -> str | None:
    """Return what has changed since the job was planned, or None."""
    current, own = champion(tracker, job.model), version_of(tracker, job)
    now = current.uri if current else None
    if now not in (job.warm_start, own.uri if own else None):
        was = job.warm_start or "none"
        return f"the champion has changed since the night was planned: it was {was}, and it is now {now or 'none'}"
    try:
        same = job.base is None or source_digest(settings.model(job.model)) == job.base
    except Exception:  # whatever it is, the stage that needs the files reports it
        return None
    return None if same else f"the files of model {job.model} have changed since the night was planned"


def _walk(
    folder: JobFolder,
    settings: Settings,
    store: RequestStore,
    tracker: Tracker,
    run_id: str,
    home: str,
    held: Lease,
) -> bool:
    """Take the job through its stages; return whether its version was promoted."""
    job, progress, blobs = folder.job.expect(), folder.progress, open_blobs(settings)

    def usable(prepared: PreparedJob) -> bool:
        return folder.evidence.read() is not None or all_open(blobs, *prepared.tensors)

    progress("prepare")
    with timed(job.model, "prepare"):
        _in_task(lambda: _start(_prepare, folder, home), folder.prepared, valid=usable)
    # A job of a release that did not examine the base model goes on behind its training.
    if folder.hotfix.read() is None and folder.evidence.read() is None:
        progress("examine")
        with timed(job.model, "examine"):
            _in_task(lambda: _start(_examine, folder, home), folder.baseline)
    if not _anything_to_train(folder, job):
        _in_task(lambda: _start(_examine, folder, home), folder.evidence)
        return False
    progress("train")
    with timed(job.model, "train"):
        train_job(folder, tracker, run_id)
    progress("evaluate", 0, len(job.everything) + 1)
    with timed(job.model, "evaluate"):
        _in_task(lambda: _start(_evaluate, folder, home), folder.evidence)
    held.check()
    progress("register")
    with timed(job.model, "register"):
        folder.version.once(
            lambda: register_version(folder, tracker, run_id, blobs),
            valid=lambda _: version_of(tracker, job) is not None,
        )
        return promote_version(folder, tracker, store)


def _in_task(
    start: "Callable[[], ray.ObjectRef[None]]",
    output: Document[Content],
    *,
    valid: Callable[[Content], bool] | None = None,
) -> None:
    """Start a Ray task that writes `output`, unless a valid one is there."""
    if output.read(valid=valid) is None:
        output.set_aside()
        ray.get(start())
    output.expect()


def _start(stage: Any, folder: JobFolder, home: str) -> "ray.ObjectRef[None]":  # noqa: ANN401  # Ray types no `options`
    """Start a stage, and ask Ray for what it computes on."""
    return stage.options(**resources(folder.job.expect().training)).remote(folder, home)


@ray.remote
def _prepare(folder: JobFolder, home: str) -> None:
    from expunge.batch.judging import prepare_judged

    settings = folder.job.expect().within(_settings(home))
    folder.prepared.once(lambda: prepare_judged(folder, settings, open_blobs(settings)))


@ray.remote
def _examine(folder: JobFolder, home: str) -> None:
    from expunge.evaluation.measure import examine, nothing_to_do

    settings = folder.job.expect().within(_settings(home))
    blobs = open_blobs(settings)
    folder.baseline.once(lambda: examine(folder, settings, blobs))
    if not _anything_to_train(folder, folder.job.expect()):
        folder.evidence.once(lambda: nothing_to_do(folder, settings, blobs))


@ray.remote
def _evaluate(folder: JobFolder, home: str) -> None:
    from expunge.evaluation.measure import measure

    settings = folder.job.expect().within(_settings(home))
    folder.evidence.once(lambda: measure(folder, settings, open_blobs(settings)))


def _anything_to_train(folder: JobFolder, job: UnlearnJob) -> bool:
    """Return whether a new request is left whose pictures the base model reproduces."""
    evidence = folder.evidence.read()
    if evidence is not None:
        return evidence.integrity is not None
    baseline, skipped = folder.baseline.read(), folder.prepared.expect().skipped
    absent = baseline.not_reproduced if baseline else {}
    return any(request.id not in absent and request.id not in skipped for request in job.requests)


def _settings(home: str) -> Settings:
    """Load this node's settings, and log as they say.

    Raises UnavailableError if they are wrong, because that is no job's fault.
    """
    try:
        settings = load_settings()
        configure(settings.log_level)
        check_home(settings, home)
    except InputError as error:
        raise UnavailableError(f"node {socket.gethostname()}: {error.message}", hint=error.hint) from None
    return settings


def _params(job: UnlearnJob) -> dict[str, object]:
    resolution = "x".join(map(str, job.resolution))
    return {**job.training.model_dump(mode="json"), "source": job.source, "resolution": resolution}


def _tags(job: UnlearnJob) -> dict[str, str]:
    requests, earlier = len(job.requests), len(job.ledger)
    return {"expunge.batch": job.batch, "expunge.requests": str(requests), "expunge.ledger": str(earlier)}
