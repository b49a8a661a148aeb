"""A job has one run whatever happens to its driver, and an absent server is one line."""

import errno
import math
import os
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from requests import HTTPError

from expunge.errors import ExpungeError, InputError, NotFoundError, StorageError, UnavailableError
from expunge.registry.tracking import Tracker
from tests.registry.receiver import receiving


def start(tracker: Tracker, job: str = "flags-1") -> str:
    return tracker.ensure_run(
        "flags", job, params={"steps": 3, "weighting": "min_snr"}, tags={"expunge.batch": "night-1"}
    )


def test_a_run_is_found_again(tracker: Tracker) -> None:
    first = start(tracker)
    again = Tracker(tracker.uri)
    assert start(again) == first
    assert start(again, "flags-2") != first
    run = tracker.client.get_run(first)
    assert run.data.params == {"steps": "3", "weighting": "min_snr"}
    assert run.data.tags["expunge.batch"] == "night-1"
    assert tracker.client.get_experiment(run.info.experiment_id).name == "expunge/flags"


def test_a_run_resumes_with_other_params(tracker: Tracker) -> None:
    run = start(tracker)
    assert tracker.ensure_run("flags", "flags-1", params={"steps": 9, "seed": 1}, tags={}) == run
    assert tracker.client.get_run(run).data.params == {"steps": "3", "weighting": "min_snr", "seed": "1"}


def test_more_params_than_mlflow_takes_at_once(tracker: Tracker) -> None:
    run = tracker.ensure_run("flags", "flags-1", params={f"p{i}": i for i in range(150)}, tags={})
    assert len(tracker.client.get_run(run).data.params) == 150


def test_a_finished_run_runs_again(tracker: Tracker) -> None:
    run = start(tracker)
    tracker.finish(run, "FAILED")
    assert tracker.client.get_run(run).info.status == "FAILED"
    start(tracker)
    assert tracker.client.get_run(run).info.status == "RUNNING"


def test_a_deleted_experiment_comes_back(tracker: Tracker) -> None:
    run = start(tracker)
    tracker.client.delete_experiment(tracker.client.get_run(run).info.experiment_id)
    start(tracker)


def test_drivers_that_race_agree(tracker: Tracker) -> None:
    trackers = [Tracker(tracker.uri) for _ in range(4)]
    assert trackers[0].client  # the import itself is not meant to race
    with ThreadPoolExecutor(4) as pool:
        runs = pool.map(lambda one: one.ensure_run("flags", "flags-1", params={}, tags={}), trackers)
        assert len(list(runs)) == 4
    agreed = start(tracker)
    assert {start(one) for one in trackers} == {agreed}


def test_curves_are_what_was_logged(tracker: Tracker) -> None:
    run = start(tracker)
    for step in (0, 1, 2):
        tracker.log_metrics(run, step, {"loss": 1 / (step + 1), "conflict": math.nan})
    found = tracker.curves(run, ["loss", "conflict", "absent"])
    assert found["loss"] == [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))]
    assert math.isnan(found["conflict"][0][1])
    assert "absent" not in found


def test_steps_logged_again_after_a_resume_count_once(tracker: Tracker) -> None:
    run = start(tracker)
    for step, loss in [(0, 1.0), (1, 0.9), (2, 0.8)]:
        tracker.log_metrics(run, step, {"loss": loss})
    time.sleep(0.01)
    for step, loss in [(1, 0.7), (2, 0.6), (3, 0.5)]:
        tracker.log_metrics(run, step, {"loss": loss})
    assert tracker.curves(run, ["loss"]) == {"loss": [(0, 1.0), (1, 0.7), (2, 0.6), (3, 0.5)]}


def test_artifacts_lie_beside_the_database(tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = start(tracker)
    tracker.log_artifact_bytes(run, "evidence.json", b"{}")
    tracker.log_artifact_bytes(run, "plots/loss.svg", b"<svg/>")
    stored = tmp_path / "mlflow" / "artifacts" / "flags" / run / "artifacts"
    assert (stored / "evidence.json").read_bytes() == b"{}"
    assert (stored / "plots" / "loss.svg").read_bytes() == b"<svg/>"
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../b", ""])
def test_an_artifact_stays_in_its_run(tracker: Tracker, name: str) -> None:
    with pytest.raises(ValueError, match="relative path"):
        tracker.log_artifact_bytes("run", name, b"")


@pytest.mark.parametrize("uri", ["", "file:///tmp/x", "postgresql://db/x", "sqlite://", "sqlite:///:memory:", "mlruns"])
def test_other_uris_are_refused(uri: str) -> None:
    with pytest.raises(InputError, match="use sqlite:///PATH"):
        Tracker(uri)


def test_an_absent_run_is_not_found(tracker: Tracker) -> None:
    with pytest.raises(NotFoundError, match="not found"):
        tracker.finish("0" * 32, "FINISHED")


def test_an_absent_server_is_one_line_and_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    began = time.monotonic()
    with pytest.raises(UnavailableError, match="does not answer: start it, or set EXPUNGE_TRACKING_URI") as caught:
        start(Tracker("http://127.0.0.1:9"))
    assert time.monotonic() - began < 60, "MLflow's own retries take minutes"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_refuses_says_which_variables_to_check(status: int) -> None:
    with receiving(status) as server, pytest.raises(UnavailableError, match=r"refuses .*MLFLOW_TRACKING_TOKEN, or"):
        start(Tracker(server.url.rstrip("/")))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match="set EXPUNGE_HOME"):
        Tracker(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")


def test_a_database_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, but long enough to look like a file of one")
    with pytest.raises(UnavailableError, match="cannot be used"):
        start(Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}"))


FIRST_USE = """
import sys, time
from expunge.registry.tracking import Tracker
tracker = Tracker(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(tracker.ensure_run("flags", "flags-1", params={}, tags={}))
"""


@pytest.mark.slow
def test_processes_that_make_the_store_at_once_all_work(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FIRST_USE, f"sqlite:///{tmp_path}/new/mlflow.db"]
    environment, pipe = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, subprocess.PIPE
    started = [
        subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(3)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert len({out for out, _ in said}) == 1, "one run"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mlflow.db"]


@pytest.mark.parametrize(
    ("schema", "hint"),
    [("451aebb31d03", r"make a backup, `cp .*`, then run `mlflow db upgrade sqlite:///"), ("9999", "upgrade mlflow")],
    ids=["older", "newer"],
)
def test_a_store_of_another_mlflow_is_left_alone_in_one_line(tracker: Tracker, schema: str, hint: str) -> None:
    file = Path(tracker.uri.removeprefix("sqlite:///"))
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (schema,))
        connection.execute("DROP TABLE trace_info")
    before = file.read_bytes()
    with pytest.raises(UnavailableError, match=rf"was made by .* MLflow \(schema {schema}\): .*{hint}") as refused:
        start(Tracker(tracker.uri))
    assert "\n" not in str(refused.value)
    assert file.read_bytes() == before


@pytest.mark.slow
def test_a_first_use_is_silent(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    code = f"from expunge.registry import Tracker; Tracker('{uri}').ensure_run('a', 'b', params={{}}, tags={{}})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(("own", "during"), [(None, "3600"), ("7", "7")])
def test_weights_get_more_time_than_figures(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, own: str | None, during: str
) -> None:
    """A server may say nothing for minutes while it hands gigabytes on; an operator's own limit stays."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    monkeypatch.delenv(name, raising=False)
    if own is not None:
        monkeypatch.setenv(name, own)
    before = tracker.client and os.environ[name]
    with tracker.transferring():
        assert os.environ[name] == during
    assert os.environ[name] == before == (own or "60")
    with pytest.raises(NotFoundError, match="nothing there"), tracker.transferring():
        raise MlflowException("nothing there", error_code=RESOURCE_DOES_NOT_EXIST)
    assert os.environ[name] == before


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (HTTPError("500 Server Error: for url: http://mlflow/api/2.0/mlflow-artifacts"), UnavailableError),
        (RuntimeError("An error occurred (SlowDown) when calling the PutObject operation"), UnavailableError),
        (OSError(errno.ENOSPC, "No space left on device", "/artifacts/1"), StorageError),
        (PermissionError(errno.EACCES, "Permission denied", "/artifacts/1"), StorageError),
    ],
)
def test_an_artifact_store_that_fails_is_the_platforms_fault(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[ExpungeError]
) -> None:
    run = tracker.ensure_run("faces", "faces-1", params={}, tags={})

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(tracker.client, "log_artifacts", fail)
    with pytest.raises(kind, match="artifact") as caught:
        tracker.log_folder(run, "hotfix", tmp_path)
    assert type(caught.value) is kind
