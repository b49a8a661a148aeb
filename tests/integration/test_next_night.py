"""The night after removes and verifies again what the first has removed, whatever else is wrong in its batch.

A request cannot be prepared, one model cannot be loaded, another's config makes no sense, and the plan of an earlier
start was cut short: none of it holds the others up.
"""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from expunge.registry.artifacts import ledger
from expunge.registry.tracking import JOB_TAG
from expunge.registry.versions import champion
from expunge.runs.outcomes import JobOutcome, NightOutcome
from expunge.types import RequestState
from tests.integration.nights import FIRST, ODD, WEIGHTLESS, Ended, Night, Nights, night_arguments

MODEL, BATCH = "faces", "night-next"
CUT = '{"batch": "night-next", "jobs": [{"batch": "night-next", "mod'

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Next:
    """How the command ended, what it left, and the four requests of its batch."""

    end: Ended
    outcome: NightOutcome
    good: str
    unprepared: str
    unloadable: str
    odd: str

    @property
    def job(self) -> JobOutcome:
        [job] = self.outcome.outcomes
        return job


@pytest.fixture(scope="module")
def following(ray_of_session: Nights, first_night: Night) -> Next:
    nights = ray_of_session
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPUNGE_HOME", str(nights.home))
        good = nights.submit(MODEL, 10)
        unprepared = _nearly_the_same(nights)
        unloadable = nights.submit(WEIGHTLESS, 10)
        odd = nights.submit(ODD, 10)
        (nights.home / ODD / "model_index.json").write_text('{"_class_name": ["DDPMPipeline"]}')
        folder = nights.settings.runs / BATCH
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text(CUT)
        end = nights.expunge(*night_arguments(BATCH, MODEL), "--model", WEIGHTLESS, "--model", ODD)
        return Next(end, nights.outcome(BATCH), good, unprepared, unloadable, odd)


def _nearly_the_same(nights: Nights) -> str:
    """A request whose surrogate is another picture, and the same one in the model's eyes."""
    large = Image.open(nights.face(10)).convert("RGB").resize((192, 192))
    target, surrogate = nights.home.parent / "large.png", nights.home.parent / "nearly.png"
    large.save(target)
    pixels = np.asarray(large).copy()
    pixels[0, 0] ^= 1
    large = Image.fromarray(pixels)
    large.save(surrogate)
    done = nights.expunge("submit", str(target), "--model", MODEL, "--surrogate", str(surrogate), "--json")
    assert done.code == 0, done.out + done.err
    return json.loads(done.out)["id"]


def test_it_removes_the_union_from_where_the_first_ended(first_night: Night, following: Next) -> None:
    job = following.job.job
    assert [request.id for request in job.ledger] == [first_night.request]
    assert {request.id for request in job.requests} == {following.good, following.unprepared}
    assert first_night.job.version is not None
    assert job.warm_start == first_night.job.version.uri


def test_what_was_removed_earlier_is_verified_again(first_night: Night, following: Next) -> None:
    assert following.job.evidence is not None
    verdicts = {request.request: request.verdict for request in following.job.evidence.requests}
    both = {first_night.request: "passed", following.good: "passed"}
    assert verdicts == {**both, following.unprepared: "skipped"}
    assert following.job.passed == set(both)


def test_the_champion_moves_and_its_ledger_holds_both(nights: Nights, first_night: Night, following: Next) -> None:
    version = champion(nights.tracker, MODEL)
    assert version is not None
    assert version.version == "2"
    assert set(ledger(nights.tracker, MODEL).requests) == {first_night.request, following.good}


def test_each_night_has_one_version_and_one_run(nights: Nights, first_night: Night, following: Next) -> None:
    client = nights.tracker.client
    assert nights.versions(MODEL) == ["1", "2"]
    version = client.get_model_version(MODEL, "2")
    assert version.tags[JOB_TAG] == following.job.job.id
    assert version.tags["expunge.batch"] == BATCH
    assert set(version.tags["expunge.requests"].split(",")) == {first_night.request, following.good}
    runs = {client.get_run(run).data.tags["expunge.batch"]: client.get_run(run) for run in nights.runs(MODEL)}
    assert set(runs) == {FIRST, BATCH}
    assert runs[BATCH].info.run_id == version.run_id
    assert runs[BATCH].info.status == "FINISHED"


def test_the_report_names_what_was_removed_again(nights: Nights, first_night: Night, following: Next) -> None:
    report = nights.store.batch(BATCH).report
    assert report is not None
    html = nights.blobs.get(report)
    assert all(request.encode() in html for request in (first_night.request, *_all(following)))


def test_a_plan_that_was_cut_short_is_kept_aside_and_made_again(nights: Nights, following: Next) -> None:
    folder = nights.settings.runs / BATCH
    assert (folder / "plan.json.unreadable").read_text() == CUT
    assert {job.model for job in following.outcome.jobs} == {MODEL}


def test_a_model_whose_config_is_odd_is_refused_alone(nights: Nights, following: Next) -> None:
    assert set(following.outcome.refused) == {following.odd, following.unloadable}
    record = nights.store.get(following.odd)
    assert (record.state, record.attempts) == (RequestState.ACCEPTED, 1)


def test_a_request_that_cannot_be_prepared_fails_alone(nights: Nights, following: Next) -> None:
    good = nights.store.get(following.good)
    assert (good.state, good.attempts) == (RequestState.REMOVED, 0)
    record = nights.store.get(following.unprepared)
    assert record.state is RequestState.FAILED
    assert record.evidence is not None
    assert record.evidence["verdict"] == "skipped"
    assert "the same picture as its target at the model's resolution" in str(record.evidence["why"])


def test_a_model_without_weights_is_refused_in_one_line_and_its_request_waits_again(
    nights: Nights, following: Next
) -> None:
    error = following.outcome.refused[following.unloadable]
    assert error.startswith(f"model {WEIGHTLESS} ({nights.home / WEIGHTLESS}): ")
    assert "\n" not in error
    assert "weights" in error
    record = nights.store.get(following.unloadable)
    assert record.state is RequestState.ACCEPTED
    assert record.attempts == 1
    assert nights.versions(WEIGHTLESS) == []


def test_it_ends_with_the_exit_code_of_a_verdict_and_says_why(nights: Nights, following: Next) -> None:
    assert following.end.code == 3
    assert following.end.err.strip().splitlines()[-1].startswith(f"error: batch {BATCH}: not every verdict is passed: ")
    assert "Traceback" not in following.end.out + following.end.err
    lines = following.end.out.splitlines()
    rows = {request: next(line for line in lines if request in line) for request in _all(following)}
    assert "passed" in rows[following.good]
    assert "skipped" in rows[following.unprepared]
    assert "refused" in rows[following.unloadable]
    assert "refused" in rows[following.odd]
    assert f"version  models:/{MODEL}/2 (candidate, champion)" in following.end.out
    assert "passed (again)" in following.end.out
    assert nights.store.batch(BATCH).closed


def _all(following: Next) -> tuple[str, str, str, str]:
    return following.good, following.unprepared, following.unloadable, following.odd
