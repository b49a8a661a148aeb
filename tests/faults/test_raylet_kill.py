"""A node is lost in every stage of one night: where it computes Ray has another, and the night goes on there.

What walks the night through its stages stays where the driver is, on the head: for the loss of that see
test_head_loss.py. Before there is a plan there is nothing on another node to lose.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from expunge.requests.leases import lease
from expunge.runs.locks import promotion_lock
from expunge.types import RequestState
from tests.faults.trainings import FAULT_RAY
from tests.integration.nights import BIN, Nights, ended, home_with, wait_during
from tests.watching import is_alive, left_over, processes, task_process, with_children

MODEL, BATCH = "raylet-kill", "night-raylet-kill"


@pytest.fixture
def cluster(tmp_path: Path, patient_nodes: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that computes nothing, so that what is lost with a node is known, and room for one node beside it."""
    home = home_with(tmp_path, MODEL)
    for name, value in FAULT_RAY.items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield cluster
        before = with_children(processes(home))
    finally:
        cluster.shutdown()
    left = left_over(before | with_children(processes(home)))
    assert not left, f"still alive after Ray was stopped: {left}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_night_that_loses_a_node_in_every_stage_registers_once(cluster: Cluster, tmp_path: Path) -> None:
    home = tmp_path / "home"
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "EXPUNGE_HOME": str(home)}
    nights = Nights(home, environment)
    request = nights.submit(MODEL, 3)
    night = subprocess.Popen(
        [sys.executable, "-m", "expunge.jobs.nightly", "--batch", BATCH, "--model", MODEL],
        env={**environment, "RAY_ADDRESS": str(cluster.address)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    moments: dict[str, Callable[[], object]] = {
        "prepare": lambda: task_process(home, "_prepare"),
        "train": lambda: nights.checkpoints(BATCH),
        "evaluate": lambda: task_process(home, "_evaluate"),
    }
    for stage, moment in moments.items():
        node = cluster.add_node(num_cpus=2)
        wait_during(
            night, lambda stage=stage, moment=moment: nights.stage(BATCH) == stage and moment(), f"it was in {stage}"
        )
        cluster.remove_node(node, allow_graceful=False)
    # Held where it is registered and not yet at the gate: from here on it needs no node.
    with lease(nights.store, promotion_lock(MODEL), wait=True):
        node = cluster.add_node(num_cpus=2)
        [job] = [path for path in (nights.settings.runs / BATCH).glob("*") if path.is_dir()]
        wait_during(night, (job / "version.json").exists, "it was registered")
        walker = task_process(home, job.name)
        cluster.remove_node(node, allow_graceful=False)
        assert walker is not None
        assert is_alive(walker)
    end = ended(night)
    assert end.code == 0, end.out + end.err

    record = nights.store.get(request)
    assert record.state is RequestState.REMOVED
    assert record.attempts == 0
    assert nights.store.batch(BATCH).closed
    assert nights.versions(MODEL) == ["1"]
    [run] = nights.runs(MODEL)
    [losses] = nights.tracker.curves(run, ["loss/forget"]).values()
    assert [step for step, _ in losses] == [5, 10, 12]
    [outcome] = nights.outcome(BATCH).outcomes
    assert outcome.passed == {request}
