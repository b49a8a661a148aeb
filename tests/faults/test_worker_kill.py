"""SIGKILL of what computes, in every stage of one night: Ray starts it again, and nothing is done twice that shows."""

import pytest

from expunge.requests.leases import lease
from expunge.runs.locks import promotion_lock
from expunge.types import RequestState
from tests.integration.nights import LONG, Nights, ended, night_arguments, wait_during
from tests.watching import task_process, wait_until

MODEL, BATCH = "worker-kill", "night-worker-kill"
POINTS = list(range(5, LONG["steps"] + 1, 5))
"""The steps whose figures are logged: every fifth."""
CHECKPOINTS = range(4, LONG["steps"], 4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_night_goes_on_after_its_workers_are_killed_in_every_stage(nights: Nights) -> None:
    request = nights.submit(MODEL, 3)
    command = nights.start(*night_arguments(BATCH, MODEL))

    def kill_task(name: str) -> None:
        process = wait_during(command, lambda: task_process(nights.home, name), f"{name} ran")
        assert process is not None
        process.kill()

    kill_task("_prepare")

    known = wait_during(command, lambda: nights.checkpoints(BATCH), "a checkpoint")
    workers = nights.training_workers()
    assert len(workers) == 2
    workers[-1].kill()

    # Held where it is registered and not yet promoted: the task that walks the job through its stages is killed there.
    with lease(nights.store, promotion_lock(MODEL), wait=True):
        kill_task("_evaluate")
        [job] = [path for path in (nights.settings.runs / BATCH).glob("*") if path.is_dir()]
        wait_during(command, (job / "version.json").exists, "it was registered")
        kill_task(job.name)
    end = ended(command)
    assert end.code == 0, end.out + end.err

    record = nights.store.get(request)
    assert record.state is RequestState.REMOVED
    assert record.attempts == 0
    assert nights.versions(MODEL) == ["1"]
    [run] = nights.runs(MODEL)
    [losses] = nights.tracker.curves(run, ["loss/forget"]).values()
    assert [step for step, _ in losses] == POINTS
    # A start from the beginning would have written checkpoints of its own, and all are kept.
    kept = sorted(nights.checkpoints(BATCH))
    assert known <= set(kept)
    assert [name[: len("checkpoint_000004")] for name in kept] == [f"checkpoint_{step:06}" for step in CHECKPOINTS]
    [outcome] = nights.outcome(BATCH).outcomes
    assert outcome.evidence is not None
    assert outcome.passed == {request}
    wait_until(lambda: not nights.training_workers(), "the workers to end")
