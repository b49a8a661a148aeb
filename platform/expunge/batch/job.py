"""One job through its stages, as Ray tasks. What passes through Ray is the job's folder: requests stay in the home."""

import json
import socket
from collections.abc import Callable, Collection, Mapping
from contextlib import closing, suppress
from pathlib import Path

import ray

from expunge.batch.faults import cause_of, is_platforms, reason
from expunge.batch.metrics import TrainingRate, timed
from expunge.batch.outcome import JobOutcome
from expunge.batch.stages import EVIDENCE, OUTCOME, VERSION, Output, Progress, once, set_aside, stored
from expunge.errors import ExpungeError, InputError, NotFoundError, StorageError, UnavailableError
from expunge.families import source_digest
from expunge.files import lock
from expunge.logs import configure, get_logger
from expunge.registry.tracking import Tracker
from expunge.registry.versions import DamagedVersionError, champion, download, promote, register, version_of
from expunge.requests.blobs import BlobStore, DamagedBlobError, open_blobs
from expunge.requests.home import check_home
from expunge.requests.store import open_store
from expunge.settings import Settings, load_settings
from expunge.unlearning.folder import HOTFIX, JOB, PREPARED
from expunge.words import Evidence, Hotfix, Ledger, ModelVersion, PreparedJob, RequestState, UnlearnJob

PATIENCE_S = 600.0
"""How long a night waits for a database that another process holds, or that is away."""

CURVES = ("loss/forget", "loss/retain", "surgery/cosine", "surgery/conflict", "drift")


@ray.remote(num_cpus=0, max_retries=2)
def run_job(folder: Path, home: str) -> None:
    """Walk the job of `folder` through what it has not done yet, and leave its JobOutcome there.

    What is wrong with the job becomes its outcome. Raises only what the platform has to answer for; the job can then be
    continued. `home` is the id of the home that the night was submitted from.
    """
    settings = _settings(home)
    configure(settings.log_level)
    job = _job_of(folder)
    # A task whose driver was killed may live on for a moment beside the one that takes its place.
    with lock(folder / ".lock", wait=True):
        once(folder / OUTCOME, JobOutcome, lambda: _outcome(job, folder, settings, home))
    Progress(folder)("done")


def _outcome(job: UnlearnJob, folder: Path, settings: Settings, home: str) -> JobOutcome:
    tracker = Tracker(settings.tracking)
    changed = _changed(job, settings, tracker)
    if changed:
        return JobOutcome(job=job, error=changed, outdated=True)
    run_id = tracker.ensure_run(job.model, job.id, params=_params(job), tags=_tags(job))
    try:
        outcome = _run(job, folder, settings, tracker, run_id, home)
        tracker.finish(run_id, "FINISHED")
    except Exception as error:  # a model's files and a library's complaints about them are of any kind
        with suppress(ExpungeError):
            tracker.finish(run_id, "FAILED")
        if is_platforms(error):
            raise
        get_logger("batch").warning("the job failed", job=job.id, kind=type(cause_of(error)).__name__)
        changed = _changed(job, settings, tracker)
        return JobOutcome(job=job, error=changed or reason(error), outdated=bool(changed))
    return outcome


def _changed(job: UnlearnJob, settings: Settings, tracker: Tracker) -> str | None:
    """Why the job is outdated: what it was planned on is no longer there. None where it still is."""
    current, own = champion(tracker, job.model), version_of(tracker, job)
    now = current.uri if current else None
    if now not in (job.warm_start, own.uri if own else None):
        was = job.warm_start or "none"
        return f"the champion has changed since the night was planned: it was {was}, and is {now or 'none'}"
    try:
        same = job.base is None or source_digest(settings.model(job.model)) == job.base
    except Exception:  # of any kind: the stage that needs the files says what is wrong with them
        return None
    return None if same else f"the files of model {job.model} have changed since the night was planned"


def _run(job: UnlearnJob, folder: Path, settings: Settings, tracker: Tracker, run_id: str, home: str) -> JobOutcome:
    progress, blobs = Progress(folder), open_blobs(settings)

    def usable(prepared: PreparedJob) -> bool:
        return (folder / EVIDENCE).exists() or _opens(blobs, prepared.forget, prepared.retain, prepared.conditioning)

    progress("prepare")
    with timed(job.model, "prepare"):
        _in_task(lambda: _prepare.remote(folder, home), folder / PREPARED, PreparedJob, valid=usable)
    progress("train")
    with timed(job.model, "train"):
        hotfix = _train(job, folder, settings, run_id, tracker)
    progress("evaluate", 0, len(job.everything) + 1)
    with timed(job.model, "evaluate"):
        evidence = _in_task(lambda: _evaluate.remote(folder, home), folder / EVIDENCE, Evidence)
    progress("register")
    with timed(job.model, "register"):
        version = once(
            folder / VERSION,
            ModelVersion,
            lambda: _register(job, hotfix, evidence, run_id, tracker, blobs),
            valid=lambda _: version_of(tracker, job) is not None,
        )
        version = _promote(job, evidence, version, tracker, settings)
    return JobOutcome(job=job, evidence=evidence, version=version, run_id=run_id, steps=hotfix.steps)


def _in_task(
    start: "Callable[[], ray.ObjectRef[None]]",
    path: Path,
    kind: type[Output],
    *,
    valid: Callable[[Output], bool] | None = None,
) -> Output:
    """The output that a Ray task leaves at `path`, where it has not done so yet. Ray carries the folder and no more."""
    if stored(path, kind, valid=valid) is None:
        set_aside(path)
        ray.get(start())
    found = stored(path, kind)
    if found is None:
        raise StorageError(f"{path} was written and is not there", hint="check the disk, then run the night again")
    return found


@ray.remote(num_cpus=1)
def _prepare(folder: Path, home: str) -> None:
    from expunge.batch.prepare import prepare

    settings = _settings(home)
    once(folder / PREPARED, PreparedJob, lambda: prepare(_job_of(folder), settings, open_blobs(settings)))


@ray.remote(num_cpus=1)
def _evaluate(folder: Path, home: str) -> None:
    from expunge.evaluation.measure import measure

    settings, progress = _settings(home), Progress(folder)
    prepared = PreparedJob.model_validate_json((folder / PREPARED).read_bytes())
    hotfix = Hotfix.model_validate_json((folder / HOTFIX).read_bytes())

    def evaluate() -> Evidence:
        return measure(
            _job_of(folder),
            prepared,
            hotfix,
            settings,
            open_blobs(settings),
            lambda done, total: progress("evaluate", done, total),
        )

    once(folder / EVIDENCE, Evidence, evaluate)


def _settings(home: str) -> Settings:
    """This node's. Raises UnavailableError where they are wrong, which is the fault of no job."""
    try:
        settings = load_settings()
        check_home(settings, home)
    except InputError as error:
        raise UnavailableError(f"node {socket.gethostname()}: {error.message}", hint=error.hint) from None
    return settings


def _opens(blobs: BlobStore, *ids: str) -> bool:
    try:
        return all(map(blobs.get, ids))
    except (NotFoundError, DamagedBlobError):
        return False


def _job_of(folder: Path) -> UnlearnJob:
    return UnlearnJob.model_validate_json((folder / JOB).read_bytes())


def _params(job: UnlearnJob) -> dict[str, object]:
    resolution = "x".join(map(str, job.resolution))
    return {**job.training.model_dump(mode="json"), "source": job.source, "resolution": resolution}


def _tags(job: UnlearnJob) -> dict[str, str]:
    requests, earlier = len(job.requests), len(job.ledger)
    return {"expunge.batch": job.batch, "expunge.requests": str(requests), "expunge.ledger": str(earlier)}


class _Recorder:
    """Streams a training's figures to MLflow, Prometheus and the progress file; it travels to rank 0 by pickle."""

    def __init__(self, tracking: str, run_id: str, folder: Path, model: str, steps: int) -> None:
        self._tracking, self._run_id, self._folder, self._steps = tracking, run_id, folder, steps
        self._rate = TrainingRate(model)
        self._tracker: Tracker | None = None

    def __call__(self, step: int, figures: Mapping[str, float]) -> None:
        self._tracker = self._tracker or Tracker(self._tracking)
        self._tracker.log_metrics(self._run_id, step, figures)
        self._rate(step, figures)
        Progress(self._folder)("train", step, self._steps)


def _train(job: UnlearnJob, folder: Path, settings: Settings, run_id: str, tracker: Tracker) -> Hotfix:
    from expunge.unlearning.folder import TrainTask
    from expunge.unlearning.train import train

    warm = _warm_start(job, folder, tracker)
    steps = job.steps(warm=warm is not None)
    Progress(folder)("train", 0, steps)
    record = _Recorder(settings.tracking, run_id, folder, job.model, steps)
    return train(TrainTask(folder=folder, warm_start=warm, record=record))


def _warm_start(job: UnlearnJob, folder: Path, tracker: Tracker) -> Path | None:
    """The champion's weights, where they are intact, and base and adapter still the same; else None: from the base.

    An adapter of fewer layers will do: those that it lacks begin as untrained ones do.
    """
    if job.warm_start is None:
        return None
    try:
        weights = download(tracker, job.warm_start, folder / "warm_start")
    except DamagedVersionError as error:
        get_logger("batch").warning("cold start: the champion is damaged", job=job.id, why=error.message)
        return None
    about = json.loads((weights / "expunge.json").read_bytes())
    now = job.training.model_dump(mode="json")
    same_shape = all(about["training"].get(name) == now[name] for name in ("adapter", "lora_rank"))
    same_base = about["source"] == job.source and about.get("base") in (None, job.base)
    if not same_shape or not same_base:
        get_logger("batch").warning("cold start: the champion has another base or adapter", job=job.id)
        return None
    return weights


def _register(
    job: UnlearnJob,
    hotfix: Hotfix,
    evidence: Evidence,
    run_id: str,
    tracker: Tracker,
    blobs: BlobStore,
) -> ModelVersion:
    from expunge.evaluation.pictures import curves

    tracker.log_metrics(run_id, hotfix.steps, _figures(evidence))
    tracker.log_artifact_bytes(run_id, "curves.svg", curves(tracker.curves(run_id, CURVES), "training"))
    unrelated = evidence.pictures["unrelated"]
    if _opens(blobs, unrelated):  # a picture that is lost must not cost a training
        tracker.log_artifact_bytes(run_id, "unrelated.png", blobs.get(unrelated))
    removed = [request.id for request in job.everything if request.id in evidence.passed]
    return register(
        tracker,
        job=job,
        hotfix=hotfix,
        evidence=evidence,
        run_id=run_id,
        batch_id=job.batch,
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


def _promote(
    job: UnlearnJob, evidence: Evidence, version: ModelVersion, tracker: Tracker, settings: Settings
) -> ModelVersion:
    """Make it the champion, unless the champion is no longer the one that the job was planned to build on.

    Then another night has promoted a removal that this version does not hold: promoting would undo it. So would
    promoting over anything that the store calls removed and this version does not remove.
    """
    store = open_store(settings, patience=PATIENCE_S)
    with closing(store), lock(settings.runs / f".{job.model}.lock", wait=True):
        now = champion(tracker, job.model)
        current = now.uri if now else None
        removed = store.ids(RequestState.REMOVED, [job.model]).get(job.model, [])
        if _promotable(job, evidence, removed) and current in (job.warm_start, version.uri):
            return promote(tracker, version)
    return version


def _promotable(job: UnlearnJob, evidence: Evidence, removed: Collection[str]) -> bool:
    """Unrelated outputs stayed, nothing removed earlier resurfaced, and the version removes something new."""
    earlier = {*removed, *(request.id for request in job.ledger)}
    tonight = {request.id for request in job.requests}
    return evidence.integrity.passed and earlier <= evidence.passed and bool(tonight & evidence.passed)
