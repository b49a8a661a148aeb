"""The driver of a night: drain, plan, then each job through prepare, train, evaluate, register, gate; then the report.

It may be killed at any moment and started again: every stage leaves its output in the job's folder, a finished stage is
not run again, and what a stage does outside of its folder (checkpoints, the registry, the request store) is idempotent.
"""

from collections.abc import Mapping
from pathlib import Path

import ray
from ray.exceptions import RayTaskError

from expunge.batch.outcome import JobOutcome, NightOutcome, settle
from expunge.batch.plan import LedgerOf, Plan, plan
from expunge.batch.stages import Progress, once, only_driver
from expunge.errors import ExpungeError
from expunge.logs import configure, get_logger
from expunge.registry.tracking import Tracker
from expunge.registry.versions import champion, download, ledger, promote, register
from expunge.requests.blobs import open_blobs
from expunge.requests.store import RequestStore, open_store
from expunge.settings import Settings, load_settings
from expunge.words import Evidence, Hotfix, Ledger, ModelVersion, PreparedJob, RemovalBatch, RemovalRequest, UnlearnJob

CURVES = ("loss/forget", "loss/retain", "surgery/cosine", "surgery/conflict", "drift")


def run_night(settings: Settings, batch_id: str | None = None, models: list[str] | None = None) -> NightOutcome | None:
    """Run or continue a night on the Ray that this process is connected to; None where nothing waits.

    A failing job sends its requests back to the queue with the reason and holds no other job up.
    """
    log = get_logger("batch")
    store, tracker = open_store(settings), Tracker(settings.tracking)
    batch = store.drain(batch_id, models)
    if not batch.requests:
        log.info("nothing waits", batch=batch.id)
        return None
    folder = settings.runs / batch.id
    with only_driver(folder, batch.id):
        return _run(settings, store, tracker, batch, folder)


def _run(settings: Settings, store: RequestStore, tracker: Tracker, batch: RemovalBatch, folder: Path) -> NightOutcome:
    log = get_logger("batch")
    planned = once(folder / "plan.json", Plan, lambda: plan(batch, settings, _ledger_of(store, tracker)))
    log.info(
        "planned",
        batch=batch.id,
        requests=len(batch.requests),
        jobs=[job.id for job in planned.jobs],
        refused=list(planned.refused),
    )

    # All at once: Ray starts each as its resources come free. The tasks themselves only wait, so they ask for no CPU.
    running = {
        job.id: _run_job.options(name=job.id).remote(batch.id, job.model_dump_json(), folder / job.id)
        for job in planned.jobs
    }
    outcomes = tuple(_outcome(job, running[job.id]) for job in planned.jobs)
    for outcome in outcomes:
        log.info("job ended", batch=batch.id, job=outcome.job.id, error=outcome.error, passed=sorted(outcome.passed))

    settle(store, settings, batch, planned, outcomes)
    if not store.batch(batch.id).report:
        store.set_report(batch.id, _report(settings, tracker, batch, planned, outcomes))
    store.close_batch(batch.id)
    night = NightOutcome(batch=batch.id, jobs=planned.jobs, refused=planned.refused, outcomes=outcomes)
    return once(folder / "night.json", NightOutcome, lambda: night)


@ray.remote(num_cpus=0, max_retries=2)
def _run_job(batch_id: str, job_json: str, folder: Path) -> str:
    """One job through its stages; returns a JobOutcome. Only ids and paths pass through Ray."""
    settings = load_settings()
    configure(settings.log_level)
    job = UnlearnJob.model_validate_json(job_json)
    tracker, progress = Tracker(settings.tracking), Progress(folder)
    if (folder / "outcome.json").exists():
        return (folder / "outcome.json").read_text()

    progress("prepare")
    prepared = once(
        folder / "prepared.json",
        PreparedJob,
        lambda: PreparedJob.model_validate_json(ray.get(_prepare.remote(job_json))),
    )

    run_id = tracker.ensure_run(
        job.model,
        job.id,
        params={
            **job.training.model_dump(mode="json"),
            "source": job.source,
            "resolution": "x".join(map(str, job.resolution)),
        },
        tags={
            "expunge.batch": batch_id,
            "expunge.requests": str(len(job.requests)),
            "expunge.ledger": str(len(job.ledger)),
        },
    )
    progress("train", 0, job.training.steps)
    hotfix = _train(job, prepared, folder, settings, run_id, tracker)

    progress("evaluate", 0, len(job.everything) + 1)
    evidence = once(
        folder / "evidence.json",
        Evidence,
        lambda: Evidence.model_validate_json(
            ray.get(_evaluate.remote(job_json, prepared.model_dump_json(), hotfix.model_dump_json(), folder))
        ),
    )

    progress("register")
    version = once(
        folder / "version.json",
        ModelVersion,
        lambda: _register(job, hotfix, evidence, run_id, batch_id, tracker, settings),
    )
    if _promotable(job, evidence):
        version = promote(tracker, version)
    tracker.finish(run_id, "FINISHED")
    outcome = once(
        folder / "outcome.json",
        JobOutcome,
        lambda: JobOutcome(job=job, evidence=evidence, version=version, run_id=run_id),
    )
    progress("done")
    return outcome.model_dump_json()


@ray.remote(num_cpus=1)
def _prepare(job_json: str) -> str:
    from expunge.batch.prepare import prepare

    settings = load_settings()
    return prepare(UnlearnJob.model_validate_json(job_json), settings, open_blobs(settings)).model_dump_json()


@ray.remote(num_cpus=1)
def _evaluate(job_json: str, prepared_json: str, hotfix_json: str, folder: Path) -> str:
    from expunge.evaluation.measure import measure

    settings, progress = load_settings(), Progress(folder)
    return measure(
        UnlearnJob.model_validate_json(job_json),
        PreparedJob.model_validate_json(prepared_json),
        Hotfix.model_validate_json(hotfix_json),
        settings,
        open_blobs(settings),
        lambda done, total: progress("evaluate", done, total),
    ).model_dump_json()


class _Recorder:
    """Streams a training's figures to MLflow and to the progress file; it travels to rank 0 by pickle."""

    def __init__(self, tracking: str, run_id: str, folder: Path, steps: int) -> None:
        self._tracking, self._run_id, self._folder, self._steps = tracking, run_id, folder, steps
        self._tracker: Tracker | None = None

    def __call__(self, step: int, figures: Mapping[str, float]) -> None:
        self._tracker = self._tracker or Tracker(self._tracking)
        self._tracker.log_metrics(self._run_id, step, figures)
        Progress(self._folder)("train", step, self._steps)


def _train(
    job: UnlearnJob, prepared: PreparedJob, folder: Path, settings: Settings, run_id: str, tracker: Tracker
) -> Hotfix:
    from expunge.unlearning.loop import TrainTask
    from expunge.unlearning.train import train

    warm = None
    if job.warm_start:
        warm = download(tracker, job.warm_start, folder / "warm_start")
    record = _Recorder(settings.tracking, run_id, folder, job.training.steps)
    return train(TrainTask(job=job, prepared=prepared, folder=folder, warm_start=warm, record=record))


def _register(
    job: UnlearnJob,
    hotfix: Hotfix,
    evidence: Evidence,
    run_id: str,
    batch_id: str,
    tracker: Tracker,
    settings: Settings,
) -> ModelVersion:
    from expunge.evaluation.pictures import curves

    tracker.log_metrics(run_id, job.training.steps, _figures(evidence))
    tracker.log_artifact_bytes(run_id, "curves.svg", curves(tracker.curves(run_id, CURVES), "training"))
    tracker.log_artifact_bytes(run_id, "unrelated.png", open_blobs(settings).get(evidence.pictures["unrelated"]))
    removed = [request.id for request in job.everything if request.id in evidence.passed]
    return register(
        tracker,
        job=job,
        hotfix=hotfix,
        evidence=evidence,
        run_id=run_id,
        batch_id=batch_id,
        ledger=Ledger(model=job.model, version=None, requests=tuple(removed)),
    )


def _figures(evidence: Evidence) -> dict[str, float]:
    """Numbers of the whole job for MLflow; those of single requests are in evidence.json."""
    integrity = evidence.integrity.model_dump(exclude={"passed", "why"})
    shifts = [r.shift.after for r in evidence.requests if r.shift]
    return {
        **{f"integrity/{name}": value for name, value in integrity.items()},
        "forgetting/shift_mean": sum(shifts) / max(1, len(shifts)),
        "forgetting/passed": float(len(evidence.passed)),
    }


def _promotable(job: UnlearnJob, evidence: Evidence) -> bool:
    """Unrelated outputs stayed, nothing removed earlier resurfaced, and the version removes something new."""
    earlier, tonight = ({request.id for request in part} for part in (job.ledger, job.requests))
    return evidence.integrity.passed and earlier <= evidence.passed and bool(tonight & evidence.passed)


def _ledger_of(store: RequestStore, tracker: Tracker) -> LedgerOf:
    def of(model: str) -> tuple[ModelVersion | None, list[RemovalRequest]]:
        return champion(tracker, model), [store.get(request).request for request in ledger(tracker, model).requests]

    return of


def _outcome(job: UnlearnJob, reference: "ray.ObjectRef[str]") -> JobOutcome:
    try:
        return JobOutcome.model_validate_json(ray.get(reference))
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, ExpungeError) else None
        return JobOutcome(job=job, error=str(cause or error.cause or error).strip().splitlines()[-1])


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
