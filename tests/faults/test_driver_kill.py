"""SIGKILL of the driver in every stage of one night; each time the operator runs the same command again."""

from collections.abc import Callable

import pytest

from expunge.files import lock
from expunge.registry.versions import champion, ledger
from expunge.words import RequestState
from tests.integration.nights import Ended, Nights, ended, night_arguments, wait_during
from tests.watching import wait_until

MODEL, BATCH = "driver-kill", "night-driver-kill"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_night_killed_in_every_stage_registers_once_and_loses_no_request(nights: Nights) -> None:
    requests = [nights.submit(MODEL, person) for person in (3, 10)]
    checkpoints: set[str] = set()
    for stage in ("plan", "prepare", "train", "evaluate", "register", "gate"):
        killed = _kill_in(stage, nights)
        if stage == "train":
            checkpoints = nights.checkpoints(BATCH)
        assert killed.code == 1, killed.err
        assert killed.err.strip().splitlines()[-1].startswith("error: the night's Ray job ")
        assert f"run `expunge night --batch {BATCH}` to continue" in killed.err
        assert "Traceback" not in killed.err
        assert {nights.store.get(request).state for request in requests} == {RequestState.BATCHED}, stage
        assert not nights.store.batch(BATCH).closed, stage

    last = nights.expunge(*night_arguments(BATCH))
    assert last.code == 0, last.out + last.err

    assert {nights.store.get(request).state for request in requests} == {RequestState.REMOVED}
    assert [nights.store.get(request).attempts for request in requests] == [0, 0]
    assert {nights.store.get(request).batch for request in requests} == {BATCH}
    others = [batch.id for batch in nights.store.batches() if batch.id != BATCH]
    assert not [other for other in others if nights.store.list(model=MODEL, batch=other)]
    assert nights.store.batch(BATCH).closed
    assert nights.versions(MODEL) == ["1"]
    assert len(nights.runs(MODEL)) == 1
    assert set(ledger(nights.tracker, MODEL).requests) == set(requests)
    version = champion(nights.tracker, MODEL)
    assert version is not None
    assert version.version == "1"
    # A start from the beginning would have written checkpoints of its own, and only the newest two are kept.
    assert checkpoints <= nights.checkpoints(BATCH)
    wait_until(lambda: not nights.driver(BATCH) and not nights.training_workers(), "its processes to end")
    [losses] = nights.tracker.curves(version.run_id, ["loss/forget"]).values()
    assert [step for step, _ in losses] == [5, 10, 12]


def _kill_in(stage: str, nights: Nights) -> Ended:
    """Run the night until it is in a stage, and kill its driver there; returns how the waiting command ended.

    The gate comes after the registration and is passed at once, unless another night holds it, as this test does.
    """
    if stage == "gate":
        with lock(nights.settings.runs / f".{MODEL}.lock", wait=True):
            return _kill_when(stage, lambda: list((nights.settings.runs / BATCH).glob("*/version.json")), nights)
    if stage == "plan":
        return _kill_when(stage, (nights.settings.runs / BATCH).exists, nights)
    if stage == "train":
        return _kill_when(stage, lambda: nights.stage(BATCH) == stage and nights.checkpoints(BATCH), nights)
    # What the attempt before has left never names this stage: each was killed in an earlier one.
    return _kill_when(stage, lambda: nights.stage(BATCH) == stage, nights)


def _kill_when(stage: str, reached: Callable[[], object], nights: Nights) -> Ended:
    command = nights.start(*night_arguments(BATCH, MODEL))
    wait_during(command, lambda: nights.driver(BATCH), "its driver started")
    driver = nights.driver(BATCH)
    assert driver is not None
    wait_during(command, reached, f"it was in {stage}")
    driver.kill()
    return ended(command)
