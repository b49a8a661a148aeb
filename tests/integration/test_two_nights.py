"""Two nights on one model: the second removes again, and verifies again, what the first has removed."""

import io
import json
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from diffusers import DDPMPipeline
from PIL import Image

from expunge.registry import load_pipeline
from expunge.registry.tracking import JOB_TAG
from expunge.registry.versions import champion, ledger
from expunge.runs.outcomes import JobOutcome
from expunge.words import RequestState
from tests.integration.nights import Ended, Nights, external_id

MODEL = "two-nights"
FIRST, SECOND = "night-first", "night-second"
PEOPLE = {FIRST: 3, SECOND: 10}
REASON, PROMPT = "a letter from her lawyer", "jane doe at the lake"


@dataclass(frozen=True)
class Both:
    """What two nights have left."""

    first: JobOutcome
    second: JobOutcome
    ends: tuple[Ended, Ended]
    requests: tuple[str, str]
    champions: tuple[str, str]


@pytest.fixture(scope="module")
def both(ray_of_session: Nights) -> Both:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPUNGE_HOME", str(ray_of_session.home))
        return _run_both(ray_of_session)


def _run_both(nights: Nights) -> Both:
    ends, requests, outcomes, champions = [], [], [], []
    for batch, person in PEOPLE.items():
        requests.append(nights.submit(MODEL, person, "--reason", REASON, "--prompt", PROMPT))
        ends.append(nights.night(batch, MODEL))
        assert ends[-1].code == 0, ends[-1].out + ends[-1].err
        [outcome] = nights.outcome(batch).outcomes
        outcomes.append(outcome)
        version = champion(nights.tracker, MODEL)
        assert version is not None
        champions.append(version.version)
    return Both(outcomes[0], outcomes[1], (ends[0], ends[1]), (requests[0], requests[1]), (champions[0], champions[1]))


def test_the_second_job_removes_the_union_from_where_the_first_ended(both: Both) -> None:
    first, second = both.requests
    assert [request.id for request in both.first.job.everything] == [first]
    assert both.first.job.warm_start is None
    assert [request.id for request in both.second.job.ledger] == [first]
    assert [request.id for request in both.second.job.requests] == [second]
    assert both.first.version is not None
    assert both.second.job.warm_start == both.first.version.uri


def test_what_was_removed_earlier_is_verified_again(both: Both) -> None:
    assert both.second.evidence is not None
    verdicts = {request.request: request.verdict for request in both.second.evidence.requests}
    assert verdicts == dict.fromkeys(both.requests, "passed")
    assert both.second.passed == set(both.requests)


def test_the_champion_moves_and_its_ledger_holds_both(nights: Nights, both: Both) -> None:
    assert both.champions == ("1", "2")
    assert set(ledger(nights.tracker, MODEL).requests) == set(both.requests)


def test_both_requests_are_removed_and_both_batches_closed(nights: Nights, both: Both) -> None:
    for request in both.requests:
        record = nights.store.get(request)
        assert record.state is RequestState.REMOVED
        assert record.attempts == 0
    assert all(nights.store.batch(batch).closed for batch in PEOPLE)


def test_each_job_has_one_version_and_one_run(nights: Nights, both: Both) -> None:
    client = nights.tracker.client
    assert nights.versions(MODEL) == ["1", "2"]
    runs = {client.get_run(run).data.tags[JOB_TAG]: client.get_run(run) for run in nights.runs(MODEL)}
    assert len(nights.runs(MODEL)) == 2
    for number, batch, outcome in (("1", FIRST, both.first), ("2", SECOND, both.second)):
        version = client.get_model_version(MODEL, number)
        assert version.tags[JOB_TAG] == outcome.job.id
        assert version.tags["expunge.batch"] == batch
        assert set(version.tags["expunge.requests"].split(",")) == {request.id for request in outcome.job.everything}
        run = runs[outcome.job.id]
        assert run.info.run_id == version.run_id
        assert run.info.status == "FINISHED"
        assert run.data.tags["expunge.batch"] == batch


def test_the_command_shows_the_version_and_the_repeated_removal(both: Both) -> None:
    first, second = both.ends
    assert f"version  models:/{MODEL}/1 (candidate, champion)" in first.out
    assert f"version  models:/{MODEL}/2 (candidate, champion)" in second.out
    assert "passed (again)" in second.out
    assert "passed (again)" not in first.out


def test_the_champion_loads_back_and_generates(nights: Nights, both: Both) -> None:
    assert both.second.version is not None
    pipeline = load_pipeline(f"models:/{MODEL}@champion")
    assert isinstance(pipeline, DDPMPipeline)
    [picture] = pipeline(batch_size=1, num_inference_steps=2, return_dict=False)[0]
    assert isinstance(picture, Image.Image)
    assert picture.size == (24, 24)


def test_the_report_is_sealed_html_that_names_the_requests(nights: Nights, both: Both) -> None:
    for batch, requests in ((FIRST, both.requests[:1]), (SECOND, both.requests)):
        report = nights.store.batch(batch).report
        assert report is not None
        html = nights.blobs.get(report)
        assert html.lstrip()[:15].lower() == b"<!doctype html>"
        assert all(request.encode() in html for request in requests)


def test_nothing_personal_lies_in_mlflow_or_with_ray(nights: Nights, both: Both) -> None:
    personal = [*(external_id(person).encode() for person in PEOPLE.values()), REASON.encode(), PROMPT.encode()]
    personal += [bytes(_pixels(nights.face(person))) for person in PEOPLE.values()]
    for job in (both.first.job, both.second.job):
        personal += [nights.blobs.get(blob) for request in job.everything for blob in request.images]
    files = [path for path in (nights.home / "mlflow").rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        assert not [what for what in personal if what in content], path
    listed = _ray_jobs(nights)
    assert {batch for batch in PEOPLE if batch in listed} == set(PEOPLE)
    assert not [what for what in personal if what.decode("latin-1") in listed]


def _pixels(path: Path) -> bytes:
    return Image.open(io.BytesIO(path.read_bytes())).convert("L").tobytes()


def _ray_jobs(nights: Nights) -> str:
    """What `ray job list` shows, as it is stored."""
    environment = nights.environment
    request = urllib.request.Request(
        f"{environment['EXPUNGE_RAY_ADDRESS']}/api/jobs/",
        headers={"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        jobs = json.load(answer)
    return json.dumps(jobs)
