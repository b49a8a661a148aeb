"""Two nodes on a network that is cut between them: no connection is closed, there is only silence."""

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from expunge.errors import ExpungeError
from expunge.runs.job import JobFolder
from tests.faults.networks import Host, network
from tests.faults.trainings import Training, make_training
from tests.integration.nights import BIN, TEST_RAY
from tests.watching import GRACE_S, wait_until, words

PORT = 6399
ROOT = Path(__file__).parents[2]


@dataclass
class Remote(Training):
    """A training whose driver is a process on a host."""

    host: Host | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def _run(self) -> None:
        assert self.host is not None
        log = self.folder / "driver.log"
        command = [sys.executable, "-m", "tests.faults.drive", str(self.folder)]
        command += [f"{self.host.address}:{PORT}", self.host.address]
        code = self.host.start(*command, environment=self.environment, log=log).wait()
        if code:
            self.error = ExpungeError(log.read_text().splitlines()[-1])
        else:
            self.hotfix = JobFolder(self.folder).hotfix.expect()


@dataclass
class Nodes:
    hosts: list[Host]
    environment: dict[str, str]
    logs: Path
    scratch: Path

    def start(self, host: Host) -> None:
        """A Ray node of one CPU on a host; the first one's is the head."""
        command = [str(BIN / "ray"), "start", "--block", "--num-cpus=1", f"--node-ip-address={host.address}"]
        command += ["--min-worker-port=20000", "--max-worker-port=29999", "--object-store-memory=200000000"]
        head = self.hosts[0]
        if host is head:
            command += ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self.scratch}"]
        else:
            command += [f"--address={head.address}:{PORT}"]
        log = self.logs / f"{host.namespace}.log"
        process = host.start(*command, environment=self.environment, log=log)
        started = "Ray runtime started"
        wait_until(lambda: process.poll() is not None or started in log.read_text(), "Ray to start")
        assert process.poll() is None, log.read_text()


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    scratch = Path(tempfile.mkdtemp(prefix="xp-", dir="/tmp"))  # a socket's path must be short
    try:
        with network(3) as hosts:
            environment = {
                **os.environ,
                **TEST_RAY,
                "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)]),
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
                # With more than one interface, gloo has to be told.
                "GLOO_SOCKET_IFNAME": "eth0",
                # A silent node is lost after some 15 s instead of 30: less, and a busy machine would look like silence.
                "RAY_health_check_period_ms": "1000",
                "RAY_health_check_timeout_ms": "5000",
                "RAY_health_check_failure_threshold": "3",
            }
            yield Nodes(hosts, environment, tmp_path, scratch)
            left = [process for host in hosts for process in host.processes]
        _, alive = psutil.wait_procs(left, timeout=GRACE_S)
        assert not alive, "processes outlive their hosts"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_node_that_falls_silent_is_replaced(nodes: Nodes, tmp_path: Path) -> None:
    head, lost, spare = nodes.hosts
    nodes.start(head)
    nodes.start(lost)
    made = make_training(tmp_path / "job", workers=2, worker_timeout_s=45)
    training = Remote(made.folder, made.job, host=head, environment=nodes.environment)
    training.hold_at(10)
    training.start()
    training.wait_for(10)
    training.wait_until_known(6, 9)
    lost.cut()
    nodes.start(spare)
    training.wait_for(10, times=2)
    training.release()
    training.join()
    assert training.error is None
    assert training.hotfix is not None
    assert [line["step"] for line in training.figures] == [5, 10, 10, 12], "it went on from step 9"
    workers = [p for p in spare.processes if any("RayTrainWorker" in word for word in words(p))]
    assert not workers, "the worker ends with its job"
