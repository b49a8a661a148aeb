"""Requests, jobs and evidence that differ by what a test names, a real store on SQLite, and a night without Ray."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Literal

import pytest
import ray

from expunge.batch import driver
from expunge.batch.job import walk_job
from expunge.requests.store import RequestStore, open_store
from expunge.runs.job import JobFolder
from expunge.settings import Settings, load_settings
from expunge.types import Evidence, IntegrityEvidence, ModelVersion, RemovalRequest, RequestEvidence, UnlearnJob

Ask = Callable[..., RemovalRequest]
Judge = Callable[..., Evidence]
Verdict = Literal["passed", "failed", "skipped", "not_reproduced"]


@pytest.fixture
def settings() -> Settings:
    return load_settings()


@pytest.fixture
def store(settings: Settings) -> Iterator[RequestStore]:
    opened = open_store(settings)
    yield opened
    opened.close()


@pytest.fixture
def ask() -> Ask:
    def make(name: str, **fields: object) -> RemovalRequest:
        given = {"id": f"req-{name}", "model": "flags", "images": ["0" * 64], "external_id": f"ticket-{name}"}
        return RemovalRequest.model_validate({**given, **fields})

    return make


@pytest.fixture
def judge() -> Judge:
    """Evidence for a job: each request by its verdict, `passed` unless named."""

    def make(job: UnlearnJob, *, intact: bool = True, trained: bool = True, **verdicts: Verdict) -> Evidence:
        requests = tuple(
            RequestEvidence(
                request=request.id,
                verdict=verdicts.get(request.id.removeprefix("req-"), "passed"),
                why=f"measured {request.id}",
            )
            for request in job.everything
        )
        figures = {"psnr": 30, "psnr_unrelated": 10, "ssim": 0.9, "ssim_unrelated": 0.1, "kid": 0, "kid_floor": 0}
        integrity = IntegrityEvidence.model_validate(
            {**figures, "passed": intact, "why": "intact" if intact else "PSNR 12 is below 20"}
        )
        return Evidence(job=job.id, requests=requests, integrity=integrity if trained else None)

    return make


class Here:
    """Stands where Ray would run a job's task: it runs when its result is asked for, in this process."""

    def options(self, **options: object) -> "Here":
        return self

    def remote(self, folder: JobFolder, home: str) -> Callable[[], None]:
        return lambda: walk_job(folder, home)


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a night's jobs in this process. A stage that starts a task of its own fails."""
    monkeypatch.setattr(driver, "run_job", Here())
    monkeypatch.setattr(ray, "get", lambda started: started())
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "0" * 56))


@pytest.fixture
def champion() -> ModelVersion:
    return ModelVersion(name="flags", version="3", run_id="run-3", aliases=("champion",))
