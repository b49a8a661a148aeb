"""The training of a job: where it starts from, and where its figures go."""

import json
from collections.abc import Mapping
from pathlib import Path

from expunge.batch.metrics import TrainingRate
from expunge.logs import get_logger
from expunge.registry.artifacts import DamagedVersionError, download
from expunge.registry.seals import ABOUT
from expunge.registry.tracking import Tracker
from expunge.runs.job import JobFolder
from expunge.runs.progress import Progress
from expunge.settings import load_settings
from expunge.types import Hotfix, UnlearnJob

CURVES = ("loss/forget", "loss/retain", "surgery/cosine", "surgery/conflict", "drift")
"""The training figures that a report shows."""


def train_job(folder: JobFolder, tracker: Tracker, run_id: str) -> Hotfix:
    """Train the job in `folder`, unless it already has a hotfix, and stream its figures to the MLflow run."""
    from expunge.unlearning.train import train

    job = folder.job.expect()
    start = warm_start(job, folder, tracker)
    steps = job.steps(warm=start is not None)
    folder.progress("train", 0, steps)
    record = _Recorder(run_id, folder.progress, job.model, steps)
    return train(folder, warm_start=start, record=record)


def warm_start(job: UnlearnJob, folder: JobFolder, tracker: Tracker) -> Path | None:
    """Fetch the champion's weights; return None, to start from the base, if they are damaged or do not fit the job.

    They fit if base and adapter are the same. The adapter may have fewer layers: the others start untrained.
    """
    if job.warm_start is None:
        return None
    try:
        weights = download(tracker, job.warm_start, folder.champion)
    except DamagedVersionError as error:
        get_logger("batch").warning("cold start: the champion is damaged", job=job.id, why=error.message)
        return None
    about = json.loads((weights / ABOUT).read_bytes())
    now = job.training.model_dump(mode="json")
    same_shape = all(about["training"].get(name) == now[name] for name in ("adapter", "lora_rank"))
    same_base = about["source"] == job.source and about.get("base") in (None, job.base)
    if not same_shape or not same_base:
        get_logger("batch").warning("cold start: the champion has another base or adapter", job=job.id)
        return None
    return weights


class _Recorder:
    """Streams a training's figures to MLflow, Prometheus and the progress file.

    Ray pickles it to rank 0, so it does not hold the tracking server's URL, which may contain a password: the node that
    it runs on reads its own settings.
    """

    def __init__(self, run_id: str, progress: Progress, model: str, steps: int) -> None:
        self._run_id, self._progress, self._steps = run_id, progress, steps
        self._rate = TrainingRate(model)
        self._tracker: Tracker | None = None

    def __call__(self, step: int, figures: Mapping[str, float]) -> None:
        self._tracker = self._tracker or Tracker(load_settings().tracking)
        self._tracker.log_metrics(self._run_id, step, figures)
        self._rate(step, figures)
        self._progress("train", step, self._steps)
