"""What goes wrong between a night's training and production: each fault, and what a person finds afterwards.

Elsewhere: tampered files in test_seals.py, a kill during the registration in test_versions.py, a registry that stays
down in ../batch/test_registering.py, a full disk in test_export.py, removals that are lost in ../batch/test_lost.py.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import boto3
import pytest

from expunge.batch.plan import plan_night
from expunge.batch.registering import promote_version
from expunge.registry import artifacts, versions
from expunge.registry.tracking import Tracker
from expunge.requests.store import RequestStore, open_store
from expunge.runs.job import JobFolder
from expunge.settings import Settings, load_settings
from expunge.types import Evidence, ModelVersion, RemovalRequest, UnlearnJob
from tests.batch.versions import registered
from tests.registry.conftest import killed_at
from tests.watching import wait_until

Register = Callable[..., ModelVersion]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Door:
    """A port that closes its first connections without a word, as a server that restarts does, and then passes on."""

    def __init__(self, to: int) -> None:
        self.shut = 0
        """How many more connections are closed."""
        self._to = to
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _serve(self) -> None:
        while True:
            try:
                here, _ = self._listening.accept()
            except OSError:
                return
            if self.shut:
                self.shut -= 1
                here.close()
                continue
            there = socket.create_connection(("127.0.0.1", self._to))
            for one, other in ((here, there), (there, here)):
                threading.Thread(target=_pass_on, args=(one, other), daemon=True).start()


def _pass_on(one: socket.socket, other: socket.socket) -> None:
    try:
        while data := one.recv(65536):
            other.sendall(data)
    except OSError:
        pass
    finally:
        for each in (one, other):
            each.close()


ARTIFACTS_ALONE = {"MLFLOW_CREATE_MODEL_VERSION_SOURCE_VALIDATION_REGEX": "^mlflow-artifacts:/.*$"}
"""What a server should be started with, so that a version cannot name a file of the server's own."""


@contextmanager
def mlflow_server(database: Path, port: int, artifacts: str) -> Iterator[None]:
    uri = f"sqlite:///{database}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--workers", "1"]
    command += ["--artifacts-destination", artifacts, "--host", "127.0.0.1", "--port", str(port)]
    environment, null = {**os.environ, **ARTIFACTS_ALONE}, subprocess.DEVNULL
    with subprocess.Popen(command, env=environment, stdout=null, stderr=null, start_new_session=True) as it:
        try:
            wait_until(lambda: it.poll() is not None or _listens(port), "MLflow's server")
            yield
        finally:
            os.killpg(it.pid, 15)


def _listens(port: int) -> bool:
    with socket.socket() as attempt:
        return attempt.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_a_server_that_drops_connections_is_asked_again(
    migrated: Path,
    tmp_path: Path,
    s3: Callable[[str], str],
    make_job: Callable[..., UnlearnJob],
    make_evidence: Callable[..., Evidence],
) -> None:
    """Without a word to anybody: what is asked again is registered once, and its files, in a bucket, are whole."""
    database = tmp_path / "server" / "mlflow.db"
    database.parent.mkdir()
    database.write_bytes(migrated.read_bytes())
    port = free_port()
    with ExitStack() as stack:
        stack.enter_context(mlflow_server(database, port, s3("mlflow")))
        door = Door(port)
        stack.callback(door.close)
        tracker, job = Tracker(f"http://127.0.0.1:{door.port}"), make_job()
        evidence = make_evidence(job, "r-1", "r-2")
        door.shut = 2
        first = registered(job, evidence, tracker, tmp_path / "hotfix")
        assert door.shut == 0
        door.shut = 2
        stored = boto3.client("s3").list_objects_v2(Bucket="mlflow")["Contents"]
        assert any(each["Key"].endswith("hotfix/MLmodel") for each in stored)
        assert versions.promote(tracker, first).aliases == ("candidate", "champion")
        assert registered(job, evidence, tracker, tmp_path / "hotfix").version == "1"
        assert artifacts.download(tracker, first.uri, tmp_path / "copy").joinpath("weights.safetensors").is_file()


@pytest.mark.parametrize("call", ["set_model_version_tag", "set_registered_model_alias"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_kill_during_a_promotion_converges(
    tracker: Tracker, register: Register, monkeypatch: pytest.MonkeyPatch, call: str, after: bool
) -> None:
    first, second = register("r-1", seed=0), register("r-1", seed=1)
    versions.promote(tracker, first)
    with killed_at(monkeypatch, tracker, call, after=after):
        versions.promote(tracker, second)
    now = versions.champion(tracker, "flags")
    assert now is not None
    assert now.version in ("1", "2"), "there is a champion at every moment"
    assert versions.promote(tracker, second).aliases == ("candidate", "champion")
    assert versions.former_champions(tracker, "flags") == {"1", "2"}


def test_of_two_nights_that_promote_at_once_one_wins(
    store: RequestStore, empty_registry: Tracker, make_evidence: Callable[..., Evidence], tmp_path: Path
) -> None:
    """Both were planned over the same champion; the other one's removals wait for the next night."""
    settings, tracker = load_settings(), empty_registry
    folders = [_evaluated(name, store, tracker, settings, make_evidence, tmp_path) for name in ("a", "b")]
    together = threading.Barrier(2)

    def promote(folder: JobFolder) -> bool:
        mine = open_store(settings)
        together.wait()
        try:
            return promote_version(folder, Tracker(settings.tracking), mine)
        finally:
            mine.close()

    with ThreadPoolExecutor(2) as pool:
        promoted = list(pool.map(promote, folders))
    assert sorted(promoted) == [False, True]
    champion = versions.champion(tracker, "flags")
    assert champion is not None
    assert champion.uri == folders[promoted.index(True)].version.expect().uri


def _evaluated(
    name: str,
    store: RequestStore,
    tracker: Tracker,
    settings: Settings,
    make_evidence: Callable[..., Evidence],
    tmp_path: Path,
) -> JobFolder:
    """The folder of a night's job when promotion is up."""
    store.add(RemovalRequest(id=f"req-{name}", model="flags", images=("0" * 64,), external_id=name))
    (job,) = plan_night(store.drain(f"night-{name}"), settings, lambda model: (None, [])).jobs
    evidence = make_evidence(job, f"req-{name}")
    folder = JobFolder(settings.runs / job.batch / job.id)
    folder.job.write(job)
    folder.evidence.write(evidence)
    folder.version.write(registered(job, evidence, tracker, tmp_path / name))
    return folder


@pytest.mark.parametrize("hours", [-24 * 365, 24 * 365])
def test_a_clock_that_was_set_changes_no_order_of_versions(
    tracker: Tracker, register: Register, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    versions.promote(tracker, register("r-1", seed=0))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600 * hours)
    second = register("r-1", seed=1)
    assert second.aliases == ("candidate",)
    assert [str(each.version) for each in versions.all_versions(tracker, "flags")] == ["1", "2"]
    found = tracker.client.get_model_version("flags", "2").creation_timestamp
    assert abs(found / 1000 - real()) > 24 * 3600, "MLflow's clock was set as well"
    assert versions.promote(tracker, second).aliases == ("candidate", "champion")
    assert versions.former_champions(tracker, "flags") == {"1", "2"}
    assert register("r-1", seed=0).aliases == ()
