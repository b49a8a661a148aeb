"""One whole night on Ray: a request is submitted, trained, verified, registered, promoted and reported."""

import io
import json
import urllib.request
from pathlib import Path

from diffusers import DDPMPipeline
from PIL import Image

from expunge.registry import load_pipeline
from expunge.registry.artifacts import ledger
from expunge.registry.tracking import JOB_TAG
from expunge.types import RequestState
from tests.integration.nights import FIRST, PROMPT, REASON, Night, Nights, external_id
from tests.watching import HANGS_S

MODEL = "faces"


def test_its_only_job_starts_from_the_base_model_and_passes(first_night: Night) -> None:
    job = first_night.job.job
    assert [request.id for request in job.everything] == [first_night.request]
    assert job.warm_start is None
    assert first_night.job.passed == {first_night.request}


def test_the_request_is_removed_and_the_batch_closed(nights: Nights, first_night: Night) -> None:
    record = nights.store.get(first_night.request)
    assert record.state is RequestState.REMOVED
    assert record.attempts == 0
    assert nights.store.batch(FIRST).closed


def test_the_champion_holds_the_removal(nights: Nights, first_night: Night) -> None:
    assert first_night.champion == "1"
    assert set(ledger(nights.tracker, MODEL).requests) >= {first_night.request}


def test_the_job_has_one_version_and_one_run(nights: Nights, first_night: Night) -> None:
    client, job = nights.tracker.client, first_night.job.job
    version = client.get_model_version(MODEL, "1")
    assert version.tags[JOB_TAG] == job.id
    assert version.tags["expunge.batch"] == FIRST
    assert version.tags["expunge.requests"] == first_night.request
    everything = [client.get_run(run) for run in nights.runs(MODEL)]
    [run] = [run for run in everything if run.data.tags["expunge.batch"] == FIRST]
    assert run.info.run_id == version.run_id
    assert run.info.status == "FINISHED"
    assert run.data.tags[JOB_TAG] == job.id


def test_the_command_shows_the_verdict_and_the_version(first_night: Night) -> None:
    assert f"version  models:/{MODEL}/1 (candidate, champion)" in first_night.end.out
    [row] = [line for line in first_night.end.out.splitlines() if first_night.request in line]
    assert "passed" in row
    assert "(again)" not in row


def test_the_champion_loads_back_and_generates(nights: Nights, first_night: Night) -> None:
    pipeline = load_pipeline(f"models:/{MODEL}@champion")
    assert isinstance(pipeline, DDPMPipeline)
    [picture] = pipeline(batch_size=1, num_inference_steps=2, return_dict=False)[0]
    assert isinstance(picture, Image.Image)
    assert picture.size == (24, 24)


def test_the_report_is_sealed_and_the_command_opens_it(nights: Nights, first_night: Night, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = nights.expunge("report", FIRST, "--output", str(page))
    assert done.code == 0, done.out + done.err
    html = page.read_bytes()
    assert html.lstrip()[:15].lower() == b"<!doctype html>"
    assert first_night.request.encode() in html
    report = nights.store.batch(FIRST).report
    assert report is not None
    assert nights.blobs.get(report) == html
    assert not [path for path in nights.home.rglob("*") if path.is_file() and html in path.read_bytes()]


def test_nothing_personal_lies_in_mlflow_or_with_ray(nights: Nights, first_night: Night) -> None:
    personal = [external_id(3).encode(), REASON.encode(), PROMPT.encode(), _pixels(nights.face(3))]
    personal += [nights.blobs.get(blob) for request in first_night.job.job.everything for blob in request.images]
    files = [path for path in (nights.home / "mlflow").rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        assert not [what for what in personal if what in content], path
    listed = _ray_jobs(nights)
    assert FIRST in listed
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
    with urllib.request.urlopen(request, timeout=HANGS_S) as answer:
        jobs = json.load(answer)
    return json.dumps(jobs)
