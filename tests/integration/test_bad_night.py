"""A night on which a request cannot be prepared, one model cannot be loaded, another's config makes no sense, and the
plan of an earlier start was cut short: none of it holds the others up."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from expunge.runs.outcomes import NightOutcome
from expunge.words import RequestState
from tests.integration.nights import ODD, WEIGHTLESS, Ended, Nights, night_arguments

MODEL, BATCH = "bad-night", "night-bad"
CUT = '{"batch": "night-bad", "jobs": [{"batch": "night-bad", "mod'


@dataclass(frozen=True)
class Bad:
    end: Ended
    outcome: NightOutcome
    good: str
    unprepared: str
    unloadable: str
    odd: str


@pytest.fixture(scope="module")
def bad(ray_of_session: Nights) -> Bad:
    nights = ray_of_session
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPUNGE_HOME", str(nights.home))
        good = nights.submit(MODEL, 3)
        unprepared = _nearly_the_same(nights)
        unloadable = nights.submit(WEIGHTLESS, 10)
        odd = nights.submit(ODD, 10)
        (nights.home / ODD / "model_index.json").write_text('{"_class_name": ["DDPMPipeline"]}')
        folder = nights.settings.runs / BATCH
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text(CUT)
        end = nights.expunge(*night_arguments(BATCH, MODEL), "--model", WEIGHTLESS, "--model", ODD)
        return Bad(end, nights.outcome(BATCH), good, unprepared, unloadable, odd)


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


def test_a_plan_that_was_cut_short_is_kept_aside_and_made_again(nights: Nights, bad: Bad) -> None:
    folder = nights.settings.runs / BATCH
    assert (folder / "plan.json.unreadable").read_text() == CUT
    assert {job.model for job in bad.outcome.jobs} == {MODEL}


def test_a_model_whose_config_is_odd_is_refused_alone(nights: Nights, bad: Bad) -> None:
    assert set(bad.outcome.refused) == {bad.odd, bad.unloadable}
    record = nights.store.get(bad.odd)
    assert (record.state, record.attempts) == (RequestState.ACCEPTED, 1)


def test_a_request_that_cannot_be_prepared_fails_alone(nights: Nights, bad: Bad) -> None:
    assert nights.store.get(bad.good).state is RequestState.REMOVED
    record = nights.store.get(bad.unprepared)
    assert record.state is RequestState.FAILED
    assert record.evidence is not None
    assert record.evidence["verdict"] == "skipped"
    assert "the same picture as its target at the model's resolution" in str(record.evidence["why"])
    assert nights.versions(MODEL) == ["1"]


def test_a_model_without_weights_is_refused_in_one_line_and_its_request_waits_again(nights: Nights, bad: Bad) -> None:
    error = bad.outcome.refused[bad.unloadable]
    assert error.startswith(f"model {WEIGHTLESS} ({nights.home / WEIGHTLESS}): ")
    assert "\n" not in error
    assert "weights" in error
    record = nights.store.get(bad.unloadable)
    assert record.state is RequestState.ACCEPTED
    assert record.attempts == 1
    assert nights.versions(WEIGHTLESS) == []


def test_the_night_ends_with_the_exit_code_of_a_verdict_and_says_why(nights: Nights, bad: Bad) -> None:
    assert bad.end.code == 3
    assert bad.end.err.strip().splitlines()[-1].startswith(f"error: batch {BATCH}: not every verdict is passed: ")
    assert "Traceback" not in bad.end.out + bad.end.err
    rows = {request: next(line for line in bad.end.out.splitlines() if request in line) for request in _all(bad)}
    assert "passed" in rows[bad.good]
    assert "skipped" in rows[bad.unprepared]
    assert "refused" in rows[bad.unloadable]
    assert "refused" in rows[bad.odd]
    assert f"version  models:/{MODEL}/1 (candidate, champion)" in bad.end.out
    assert nights.store.batch(BATCH).closed


def _all(bad: Bad) -> tuple[str, str, str, str]:
    return bad.good, bad.unprepared, bad.unloadable, bad.odd
