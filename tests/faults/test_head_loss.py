"""The head node is lost, and with it all of Ray: its server, its driver, its workers.

Each time the operator starts Ray anew, and runs the command that the one before has named. Twice is enough: while it
computes, and while it registers. What each stage leaves to the next driver is the same whoever killed the last one, and
test_driver_kill.py goes through them all.
"""

import subprocess
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from expunge.jobs.local_ray import local_ray
from expunge.registry.artifacts import ledger
from expunge.registry.versions import champion
from expunge.types import RequestState
from tests.integration.nights import Nights, ended, environment_of, home_with, night_in
from tests.watching import is_alive, left_over, processes, wait_until, with_children

MODEL, BATCH = "head-loss", "night-head-loss"
STAGES = ("train", "register")


@pytest.fixture
def without_ray(tmp_path: Path) -> Iterator[Nights]:
    """A home, and no Ray yet. At the end none of its processes may be left."""
    home = home_with(tmp_path, MODEL)
    yield Nights(home, environment_of(home))
    left = left_over(with_children(processes(home)))
    assert not left, f"still alive after Ray was stopped: {left}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_night_whose_head_is_lost_registers_once(without_ray: Nights) -> None:
    request = without_ray.submit(MODEL, 3)
    checkpoints: set[str] = set()
    commands: dict[str, subprocess.Popen[str]] = {}
    for stage in STAGES:
        with local_ray(without_ray.environment) as address:
            nights = _on(address, without_ray)
            with night_in(stage, nights, BATCH, MODEL) as command:
                commands[address] = command  # it asks for some seconds more: the next Ray is started meanwhile
                _lose_head(nights, commands.values())
        if stage == "train":
            checkpoints = nights.checkpoints(BATCH)
        assert nights.store.get(request).state is RequestState.BATCHED, stage
        assert not nights.store.batch(BATCH).closed, stage

    with local_ray(without_ray.environment) as address:
        nights = _on(address, without_ray)
        last = nights.night(BATCH)
    assert last.code == 0, last.out + last.err

    for address, command in commands.items():
        end = ended(command)
        assert end.code == 5, end.err
        said = end.err.strip().splitlines()[-1]
        assert said.startswith(f"error: Ray at {address} does not answer (")
        assert said.endswith(f"run `expunge night --batch {BATCH}` to continue")
        assert "Traceback" not in end.err

    record = nights.store.get(request)
    assert (record.state, record.attempts, record.batch) == (RequestState.REMOVED, 0, BATCH)
    assert nights.store.batch(BATCH).closed
    assert nights.versions(MODEL) == ["1"]
    [run] = nights.runs(MODEL)
    assert nights.tracker.client.get_run(run).info.status == "FINISHED"
    version = champion(nights.tracker, MODEL)
    assert version is not None
    assert (version.version, version.run_id) == ("1", run)
    assert set(ledger(nights.tracker, MODEL).requests) == {request}
    # A start from the beginning would have written checkpoints of its own, and only the newest two are kept.
    assert checkpoints <= nights.checkpoints(BATCH)
    [losses] = nights.tracker.curves(run, ["loss/forget"]).values()
    assert [step for step, _ in losses] == [5, 10, 12]


def _on(address: str, nights: Nights) -> Nights:
    return replace(nights, environment={**nights.environment, "EXPUNGE_RAY_ADDRESS": address})


def _lose_head(nights: Nights, commands: "Iterable[subprocess.Popen[str]]") -> None:
    """SIGKILL of all of it. The commands that wait for a night may be on another host, and live on."""

    def gone() -> bool:
        spared = {command.pid for command in commands}
        left = [p for p in with_children(processes(nights.home)) if p.pid not in spared and is_alive(p)]
        for process in left:  # until none is left: a raylet may start another meanwhile
            with suppress(psutil.Error):
                process.kill()
        return not left

    wait_until(gone, "every process of the head to end")
