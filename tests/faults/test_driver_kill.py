"""SIGKILL of the driver in every stage of one night; each time the operator runs the same command again."""

import pytest

from expunge.registry.artifacts import ledger
from expunge.registry.versions import champion
from expunge.types import RequestState
from tests.integration.nights import STAGES, Nights, ended, night_arguments, night_in
from tests.watching import wait_until

MODEL, BATCH = "driver-kill", "night-driver-kill"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_night_killed_in_every_stage_registers_once_and_loses_no_request(nights: Nights) -> None:
    requests = [nights.submit(MODEL, person) for person in (3, 10)]
    checkpoints: set[str] = set()
    for stage in STAGES:
        with night_in(stage, nights, BATCH, MODEL) as command:
            driver = nights.driver(BATCH)
            assert driver is not None
            driver.kill()
            killed = ended(command)
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
