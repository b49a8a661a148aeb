"""The tracking server with the arguments and the environment that the chart gives it, in a process of its own."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from expunge.registry.tracking import Tracker
from tests.helm.charts import Json, Rendered

START_TIMEOUT_S = 120


@dataclass(frozen=True)
class Server:
    port: int

    def ask(self, path: str, body: Json | None = None, host: str = "") -> tuple[int, str]:
        """As the service's own host, unless another is named."""
        data = json.dumps(body).encode() if body is not None else None
        headers = {"Host": host or f"expunge-mlflow:{self.port}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture(scope="module")
def server(rendered: dict[str, Rendered], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The dev profile's, on SQLite; only its paths, its port and its number of processes are others."""
    home = tmp_path_factory.mktemp("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    (container,) = rendered["dev"].one("Deployment")["spec"]["template"]["spec"]["containers"]
    moved = {"/var/lib/mlflow": str(home), "--port=5000": f"--port={port}", "--host=0.0.0.0": "--host=127.0.0.1"}
    moved |= {"--workers=2": "--workers=1", ":5000": f":{port}"}

    def here(text: str) -> str:
        for old, new in moved.items():
            text = text.replace(old, new)
        return text

    environment = {variable["name"]: here(variable["value"]) for variable in container["env"]}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(home)}
    with (home / "log").open("wb") as log:
        command = [*container["command"], *map(here, container["args"])]
        process = subprocess.Popen(command, env=environment, cwd=home, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait(process, port, home / "log")
            yield Server(port)
        finally:
            os.killpg(process.pid, 15)
            process.wait(30)


def test_the_probe_is_answered_whatever_the_host(server: Server) -> None:
    """The kubelet asks by the pod's address."""
    assert server.ask("/health", host="10.1.2.3:5000")[0] == 200


def test_a_client_inside_is_served(server: Server) -> None:
    status, text = server.ask("/api/2.0/mlflow/experiments/search", {"max_results": 1})
    assert status == 200, text


def test_another_host_name_is_not(server: Server) -> None:
    status, text = server.ask("/api/2.0/mlflow/experiments/search", {"max_results": 1}, host="evil.example.org")
    assert (status, "Invalid Host header" in text) == (403, True)


@pytest.mark.parametrize("source", ["file:///etc", "s3://elsewhere/model", "/var/lib/mlflow"])
def test_a_version_from_elsewhere_is_refused(server: Server, source: str) -> None:
    server.ask("/api/2.0/mlflow/registered-models/create", {"name": "m"})
    status, text = server.ask("/api/2.0/mlflow/model-versions/create", {"name": "m", "source": source})
    assert (status, "Invalid model version source" in text) == (400, True), text


def test_a_hotfix_is_registered_as_the_driver_does_it(server: Server, tmp_path: Path) -> None:
    """Through the component that does it: its artifacts and its version's source must pass the same server."""
    tracker = Tracker(f"http://127.0.0.1:{server.port}")
    run = tracker.ensure_run("faces", "faces-1", params={"steps": 1}, tags={})
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_bytes(b"w")
    source = tracker.log_folder(run, "hotfix", tmp_path / "adapter")
    tracker.client.create_registered_model("faces")
    version = tracker.client.create_model_version("faces", source, run)
    assert str(version.source).startswith("mlflow-artifacts:/")
    fetched = tracker.fetch(tracker.client.get_model_version_download_uri("faces", version.version), tmp_path / "back")
    assert (fetched / "weights").read_bytes() == b"w"


def _wait(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    pytest.fail(f"the server did not start:\n{log.read_text()}")
