"""A tracker of its own for each test; the database is migrated once, since that takes seconds."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest
import torch
from moto.server import ThreadedMotoServer

from expunge.families import load_model
from expunge.registry import uploading, versions
from expunge.registry.tracking import Tracker
from expunge.requests.store import RequestStore, open_store
from expunge.settings import TrainingSettings, load_settings
from expunge.types import (
    Evidence,
    Hotfix,
    IntegrityEvidence,
    Ledger,
    ModelVersion,
    RemovalRequest,
    RequestEvidence,
    UnlearnJob,
)
from expunge.unlearning import adapter
from tests.cli.conftest import command

__all__ = ["command"]

KEY = b"k" * 32
S3_KEYS = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "word", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Makes a bucket on an S3 server of this machine, to which the variables lead; returns its URL."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.setenv(name, f"http://{host}:{port}")
    for name, value in S3_KEYS.items():
        monkeypatch.setenv(name, value)

    def make(bucket: str) -> str:
        boto3.client("s3").create_bucket(Bucket=bucket)
        return f"s3://{bucket}"

    yield make
    server.stop()


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("migrated") / "mlflow.db"
    tracker = Tracker(f"sqlite:///{path}")
    with tracker.reaching():
        tracker.client.search_experiments()
    return path


@pytest.fixture
def tracker(migrated: Path, tmp_path: Path) -> Tracker:
    folder = tmp_path / "mlflow"
    folder.mkdir()
    shutil.copy(migrated, folder / "mlflow.db")
    return Tracker(f"sqlite:///{folder / 'mlflow.db'}")


@pytest.fixture
def empty_registry(migrated: Path) -> Tracker:
    """The tracker of the test's own home, in which the commands look."""
    settings = load_settings()
    tracker = Tracker(settings.tracking)
    shutil.copy(migrated, settings.home / "mlflow" / "mlflow.db")
    return tracker


@pytest.fixture
def store() -> Iterator[RequestStore]:
    opened = open_store(load_settings())
    yield opened
    opened.close()


@pytest.fixture
def make_job() -> Callable[..., UnlearnJob]:
    def make(*ids: str, seed: int = 0, source: str = "testbed:flags", model: str = "flags") -> UnlearnJob:
        requests = tuple(
            RemovalRequest(
                id=name, model=model, images=("a" * 64,), external_id=f"personal-{name}", prompt="personal-prompt"
            )
            for name in ids or ("r-1", "r-2")
        )
        return UnlearnJob(
            batch="night-1",
            model=model,
            source=source,
            resolution=(32, 48),
            requests=requests,
            training=TrainingSettings(seed=seed),
        )

    return make


@pytest.fixture
def make_evidence() -> Callable[..., Evidence]:
    def make(job: UnlearnJob, *passed: str) -> Evidence:
        requests = tuple(
            RequestEvidence(request=r.id, verdict="passed" if r.id in passed else "failed", why="measured")
            for r in job.requests
        )
        integrity = IntegrityEvidence(
            psnr=30, psnr_unrelated=10, ssim=0.9, ssim_unrelated=0.1, kid=0, kid_floor=0, passed=True, why="intact"
        )
        return Evidence(job=job.id, requests=requests, integrity=integrity, pictures={"unrelated": "b" * 64})

    return make


@pytest.fixture
def make_hotfix(tmp_path: Path) -> Callable[..., Hotfix]:
    def make(job: UnlearnJob) -> Hotfix:
        folder = tmp_path / f"hotfix-{job.id}"
        folder.mkdir(exist_ok=True)
        (folder / "pytorch_lora_weights.safetensors").write_bytes(job.id.encode())
        return Hotfix(job=job.id, kind="lora", path=folder, steps=3, digest="d" * 64)

    return make


@pytest.fixture
def register(
    tracker: Tracker,
    make_job: Callable[..., UnlearnJob],
    make_evidence: Callable[..., Evidence],
    make_hotfix: Callable[..., Hotfix],
) -> Callable[..., ModelVersion]:
    def run(*ids: str, seed: int = 0) -> ModelVersion:
        job = make_job(*ids, seed=seed)
        return uploading.register(
            tracker,
            job=job,
            hotfix=make_hotfix(job),
            evidence=make_evidence(job, "r-1"),
            run_id=tracker.ensure_run(job.model, job.id, params={}, tags={}),
            batch_id="night-1",
            ledger=Ledger(model=job.model, version=None, requests=tuple(r.id for r in job.everything)),
            key=KEY,
        )

    return run


@pytest.fixture
def publish(
    empty_registry: Tracker, make_job: Callable[..., UnlearnJob], make_evidence: Callable[..., Evidence], tmp_path: Path
) -> Callable[..., None]:
    """Promote a hotfix of a testbed that changes every weight it may."""

    def run(model: str, *, base: str | None = None) -> None:
        job = make_job(model=model, source=f"testbed:{model}").model_copy(update={"base": base})
        loaded = load_model(load_settings().model(model), job.resolution if model == "flags" else (24, 24))
        adapter.attach(loaded, TrainingSettings(lora_rank=2), None)
        torch.manual_seed(0)
        for weights in loaded.network.parameters():
            if weights.requires_grad:
                weights.data += 0.05 * torch.randn_like(weights)
        hotfix: Hotfix = adapter.export(loaded, TrainingSettings(lora_rank=2), tmp_path / "hotfix", job.id, steps=1)
        version = uploading.register(
            empty_registry,
            job=job,
            hotfix=hotfix,
            evidence=make_evidence(job),
            run_id=empty_registry.ensure_run(model, job.id, params={}, tags={}),
            batch_id="night-1",
            ledger=Ledger(model=model, version=None, requests=("r-1",)),
            key=KEY,
        )
        versions.promote(empty_registry, version)

    return run


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, tracker: Tracker, call: str, *, after: bool) -> Iterator[None]:
    """What runs inside is killed before or after it calls this of MLflow; fails if it never does."""
    real = getattr(tracker.client, call)

    def killed(*args: object, **options: object) -> None:
        if after:
            real(*args, **options)
        raise KeyboardInterrupt("killed")

    with monkeypatch.context() as patch:
        patch.setattr(tracker.client, call, killed)
        with pytest.raises(KeyboardInterrupt, match="killed"):
            yield
