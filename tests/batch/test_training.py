"""The training of a job: what passes through Ray to its workers."""

import pickle
from pathlib import Path

import pytest

from expunge.batch.training import CURVES, train_job
from expunge.registry.tracking import Tracker
from expunge.runs.job import JobFolder
from expunge.settings import Settings
from expunge.types import Hotfix
from expunge.unlearning import train
from expunge.unlearning.train import Record
from tests.runs.conftest import make_job


def test_the_recorder_carries_no_url_to_its_worker_and_finds_the_server_there(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, job = Tracker(settings.tracking), make_job("flags")
    folder = JobFolder(tmp_path / job.id)
    folder.job.write(job)

    def on_a_worker(folder: JobFolder, *, warm_start: Path | None, record: Record) -> Hotfix:
        carried = pickle.dumps(record)
        assert settings.tracking.encode() not in carried
        pickle.loads(carried)(5, {"loss/forget": 0.25})
        return Hotfix(job=job.id, kind="full", path=folder.weights, steps=5, digest="0")

    monkeypatch.setattr(train, "train", on_a_worker)
    run_id = tracker.ensure_run(job.model, job.id, params={}, tags={})
    train_job(folder, tracker, run_id)
    assert tracker.curves(run_id, CURVES) == {"loss/forget": [(5, 0.25)]}
    assert folder.progress.read() == ("train", 5, job.training.steps)
