"""SIGKILL of a training worker: Ray starts the group again, and it goes on from its checkpoint."""

import pytest

from expunge.words import RequestState
from tests.integration.nights import Nights, ended, night_arguments, wait_until

MODEL, BATCH = "worker-kill", "night-worker-kill"
POINTS = [5, 10, 12]
"""The steps whose figures are logged: every fifth, and the last."""


@pytest.mark.timeout(900)
def test_training_goes_on_from_the_checkpoint_after_a_worker_is_killed(nights: Nights) -> None:
    request = nights.submit(MODEL, 3)
    command = nights.start(*night_arguments(BATCH, MODEL))
    wait_until(lambda: command.poll() is not None or nights.checkpoints(BATCH), "a checkpoint")
    known = nights.checkpoints(BATCH)
    workers = nights.training_workers()
    assert len(workers) == 2
    workers[-1].kill()
    end = ended(command)
    assert end.code == 0, end.out + end.err

    assert nights.store.get(request).state is RequestState.REMOVED
    assert nights.versions(MODEL) == ["1"]
    [run] = nights.runs(MODEL)
    [losses] = nights.tracker.curves(run, ["loss/forget"]).values()
    assert [step for step, _ in losses] == POINTS
    # A start from the beginning would have written checkpoints of its own, and only the newest two are kept.
    assert known <= nights.checkpoints(BATCH)
    [outcome] = nights.outcome(BATCH).outcomes
    assert outcome.evidence is not None
    assert outcome.passed == {request}
