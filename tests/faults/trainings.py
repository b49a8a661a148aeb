"""A Ray cluster of two nodes in this session, and trainings on it that are small enough to be broken on purpose.

A pytest plugin, registered by the conftest beside the tests that use it. Each node has one CPU and so one worker. A
training can be held at a step, so that what breaks it breaks it there.
"""

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partialmethod
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from moto.server import ThreadedMotoServer
from pyarrow.fs import FileSelector, FileSystem, FileType
from ray._private import services
from ray.cluster_utils import Cluster

from expunge.errors import ExpungeError
from expunge.preparation.dataset import ForgetSet, RetainSet, store_set, store_tensors
from expunge.requests.blobs import open_blobs
from expunge.runs.job import JobFolder
from expunge.settings import TrainingSettings, load_settings
from expunge.types import Hotfix, PreparedJob, RemovalRequest, UnlearnJob
from expunge.unlearning.checkpoints import SNAPSHOT
from expunge.unlearning.train import train
from tests.integration.nights import TEST_RAY
from tests.watching import GRACE_S, HANGS_S, Recorder, recorded, training_workers, wait_until

HOLD = "hold"
SIZE = (24, 24)

SMALL: dict[str, Any] = {
    "steps": 12,
    "checkpoint_every": 3,
    "forget_batch": 4,
    "retain_batch": 4,
    "forget_target": "surrogate",
    "retain_target": "data",
    "objectives": "request",
    "zero_stage": 2,
    "device": "cpu",
}


# A killed node is noticed after some 5 s instead of 15. Only how often is asked: an answer may take as long as ever,
# as it does on busy machines.
FAULT_RAY = {**TEST_RAY, "RAY_health_check_period_ms": "1000"}


# The server takes any. A region that is set is not asked for.
KEYS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "any/will+do", "AWS_DEFAULT_REGION": "us-east-1"}


@dataclass(frozen=True)
class HoldingRecorder(Recorder):
    """Waits at a step for as long as the file `hold` says that step."""

    def __call__(self, step: int, figures: dict[str, float]) -> None:
        super().__call__(step, figures)
        hold = self.folder / HOLD
        while hold.exists() and hold.read_text() == str(step):
            time.sleep(0.1)


@dataclass
class Training:
    """One job in a thread of its own."""

    folder: Path
    job: UnlearnJob
    hotfix: Hotfix | None = None
    error: ExpungeError | None = None
    _thread: threading.Thread | None = field(default=None, repr=False)

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def run(self) -> None:
        self.start()
        self.join()

    def join(self) -> None:
        assert self._thread is not None
        self._thread.join(HANGS_S)
        assert not self._thread.is_alive(), f"the training did not end in {HANGS_S:.0f} s"

    def hold_at(self, step: int) -> None:
        (self.folder / HOLD).write_text(str(step))

    def release(self) -> None:
        (self.folder / HOLD).unlink()

    def wait_for(self, step: int, times: int = 1) -> None:
        def reached() -> bool:
            assert self._thread is not None
            alive = self._thread.is_alive()  # asked first: it may end between two questions
            there = [line["step"] for line in self.figures].count(step) >= times
            assert there or alive, f"ended before step {step}: {self.error}"
            return there

        wait_until(reached, f"step {step}")

    @property
    def figures(self) -> list[dict[str, float]]:
        return recorded(self.folder)

    @property
    def storage(self) -> tuple[FileSystem, str]:
        """Where its checkpoints and Ray's list of them are."""
        url = self.job.training.checkpoint_url
        storage, folder = FileSystem.from_uri(url or str(self.folder))
        return storage, f"{folder}/{self.job.id if url else 'train'}"

    @property
    def checkpoints(self) -> list[str]:
        """Paths, oldest first."""
        storage, folder = self.storage
        entries = storage.get_file_info(FileSelector(folder, allow_not_found=True))
        return sorted(e.path for e in entries if e.type == FileType.Directory and e.base_name.startswith("checkpoint_"))

    @property
    def known(self) -> list[int]:
        """The steps of the checkpoints that Ray knows, oldest first. Its controller writes them down some time after
        the workers have reported, and deletes the one too many after that."""
        storage, folder = self.storage
        try:
            with storage.open_input_stream(f"{folder}/{SNAPSHOT}") as file:
                listed = json.loads(file.read())["checkpoint_results"]
        except (FileNotFoundError, ValueError):  # none yet, or only half of it
            return []
        return [int(entry["metrics"]["step"]) for entry in listed]

    def wait_until_known(self, *steps: int) -> None:
        wait_until(lambda: self.known == list(steps), f"Ray to know of the checkpoints of steps {steps}")
        wait_until(lambda: len(self.checkpoints) == len(steps), "Ray to delete the others")

    def _run(self) -> None:
        try:
            self.hotfix = train(JobFolder(self.folder), warm_start=None, record=HoldingRecorder(self.folder))
        except ExpungeError as error:
            self.error = error


def make_training(folder: Path, *, bad: int | None = None, requests: int = 2, **training: object) -> Training:
    """A job on the small UNet with noise for pictures; that of request `bad` is not a number."""
    blobs = open_blobs(load_settings())
    generator = torch.Generator().manual_seed(0)
    x_f, x_s, x_0 = (torch.randn(requests, 1, *SIZE, generator=generator).clamp(-1, 1) for _ in range(3))
    if bad is not None:
        x_f[bad] = float("nan")
    prompt = torch.zeros(requests, dtype=torch.long)
    forget, retain = ForgetSet(x_f, x_s, prompt, torch.arange(requests)), RetainSet(x_0, prompt)
    settings = TrainingSettings.model_validate({**SMALL, **training})
    job = UnlearnJob(
        batch="faults",
        model="faces",
        source="testbed:faces",
        resolution=SIZE,
        requests=tuple(
            RemovalRequest(id=f"request-{i}", model="faces", images=("0" * 64,), external_id="x")
            for i in range(requests)
        ),
        training=settings,
    )
    stored = PreparedJob(
        job=job.id,
        forget=store_set(blobs, forget),
        retain=store_set(blobs, retain),
        conditioning=store_tensors(blobs, {"nothing": torch.zeros(1)}),
        unrelated_prompts=1,
        surrogates={},
    )
    folder.mkdir(parents=True, exist_ok=True)
    JobFolder(folder).job.write(job)
    JobFolder(folder).prepared.write(stored)
    return Training(folder, job)


@dataclass
class Trainings:
    cluster: Cluster
    home: Path

    def workers(self) -> list[psutil.Process]:
        """Of the training that is running, by age."""
        return sorted(training_workers(self.home), key=lambda process: process.create_time())


@pytest.fixture(scope="session")
def _s3() -> Iterator[dict[str, str]]:
    """Variables that lead to an S3 server of this machine."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {**KEYS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    server.stop()


@pytest.fixture
def bucket(trainings: "Trainings") -> str:
    """The URL of a folder on that server, which the cluster knows from its variables alone."""
    # By a URL: without one, pyarrow does not look at the variable that names the server.
    storage, folder = FileSystem.from_uri("s3://checkpoints?allow_bucket_creation=true")
    storage.create_dir(folder)
    return "s3://checkpoints/nights"


@pytest.fixture(scope="session")
def patient_nodes() -> Iterator[None]:
    """Ray gives a node of a `Cluster` 30 s to start, which no setting changes, and on a busy machine it needs more."""
    look_up = services.get_node

    def get_node(gcs_address: str, node_id: str) -> dict[str, Any]:
        deadline = time.monotonic() + HANGS_S
        while True:
            try:
                return look_up(gcs_address, node_id)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services, "get_node", get_node)
        patch.setattr(Cluster, "_wait_for_node", partialmethod(Cluster._wait_for_node, timeout=HANGS_S))
        yield


@pytest.fixture(scope="session")
def _cluster(_s3: dict[str, str], patient_nodes: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainings]:
    home = tmp_path_factory.mktemp("trainings")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**FAULT_RAY, **_s3, "EXPUNGE_HOME": str(home)}.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            cluster.add_node(num_cpus=1)
            ray.init(cluster.address, runtime_env={"env_vars": {"EXPUNGE_HOME": str(home)}}, log_to_driver=False)
            yield Trainings(cluster, home)
            workers = Trainings(cluster, home).workers()
            ray.shutdown()
        finally:
            cluster.shutdown()
    _, alive = psutil.wait_procs(workers, timeout=GRACE_S)
    assert not alive, "workers outlive their cluster"


@pytest.fixture
def trainings(_cluster: Trainings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainings]:
    """The session's home instead of the test's own."""
    monkeypatch.setenv("EXPUNGE_HOME", str(_cluster.home))
    yield _cluster
    for process in _cluster.workers():  # a stopped one would never end by itself
        with suppress(psutil.Error):
            process.send_signal(signal.SIGCONT)
