"""A small night: two jobs, one that went through and one that did not."""

from collections.abc import Callable
from pathlib import Path

import pytest

from expunge.requests.blobs import sealing_key
from expunge.requests.documents import Documents
from expunge.requests.vault import Vault
from expunge.runs.job import JobFolder
from expunge.runs.night import NightFolder
from expunge.runs.outcomes import JobEnd, NightPlan
from expunge.settings import TrainingSettings, load_settings
from expunge.types import (
    Evidence,
    Hotfix,
    IntegrityEvidence,
    ModelVersion,
    RemovalRequest,
    RequestEvidence,
    UnlearnJob,
)
from tests.batch.conftest import without_ray as without_ray
from tests.cli.conftest import command as command

Evaluated = Callable[[JobFolder, bool], None]


def content(path: Path) -> bytes:
    """What a night's file says: it is sealed with the key of this test's home."""
    found = Documents(Vault(sealing_key(load_settings()))).open(path, path.read_bytes())
    assert found is not None
    return found


def make_job(model: str, **fields: object) -> UnlearnJob:
    request = RemovalRequest(id=f"req-{model}", model=model, images=("0" * 64,), external_id=f"ticket-{model}")
    given = {
        "batch": "night-1",
        "model": model,
        "source": f"testbed:{model}",
        "resolution": (24, 24),
        "requests": (request,),
        "training": TrainingSettings(),
    }
    return UnlearnJob.model_validate({**given, **fields})


@pytest.fixture
def planned() -> NightPlan:
    jobs = (make_job("faces"), make_job("flags"))
    return NightPlan(batch="night-1", jobs=jobs, refused={"req-bird": "not configured"})


@pytest.fixture
def night(tmp_path: Path, planned: NightPlan) -> NightFolder:
    folder = NightFolder(tmp_path / "night-1")
    folder.mark_format()
    folder.plan_once(lambda: planned)
    return folder


@pytest.fixture
def go_through() -> Evaluated:
    """Leave in a job's folder what its stages do, as far as an outcome needs it."""

    def leave(folder: JobFolder, promoted: bool) -> None:
        job = folder.job.expect()
        figures = {"psnr": 30, "psnr_unrelated": 10, "ssim": 0.9, "ssim_unrelated": 0.1, "kid": 0, "kid_floor": 0}
        integrity = IntegrityEvidence.model_validate({**figures, "passed": True, "why": "intact"})
        requests = tuple(RequestEvidence(request=r.id, verdict="passed", why="gone") for r in job.everything)
        folder.hotfix.write(Hotfix(job=job.id, kind="full", path=folder.weights, steps=7, digest="0"))
        folder.evidence.write(Evidence(job=job.id, requests=requests, integrity=integrity))
        folder.version.write(ModelVersion(name=job.model, version="1", run_id="run-1", aliases=("candidate",)))
        folder.end.write(JobEnd(promoted=promoted))

    return leave
