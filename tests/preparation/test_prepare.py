"""prepare on the shipped faces: what a job is made of, and that a bad request is skipped alone."""

import json
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from expunge.batch.judging import sample_judging
from expunge.batch.plan import plan_night
from expunge.families import load_model
from expunge.pixels import to_pictures, to_png
from expunge.preparation.dataset import load_job
from expunge.preparation.pictures import load_picture
from expunge.preparation.prepare import MakeJudging, held_out_pictures, prepare
from expunge.requests.blobs import BlobStore, open_blobs
from expunge.requests.imaging import normalise
from expunge.runs.job import JobFolder
from expunge.settings import Settings, load_settings
from expunge.testbed import faces
from expunge.types import EditSpec, PreparedJob, RemovalBatch, RemovalRequest, UnlearnJob


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("EXPUNGE_TRAINING__RETAIN_SIZE", "4")
    monkeypatch.setenv("EXPUNGE_EVALUATION__SAMPLING_STEPS", "3")
    return load_settings()


def png(index: int) -> bytes:
    face = faces.images()[index : index + 1].expand(-1, 3, -1, -1)
    return normalise(to_png(to_pictures(face)[0]), field="face", max_pixels=10_000)


@pytest.fixture
def blobs(settings: Settings) -> BlobStore:
    return open_blobs(settings)


def ask(name: str, **fields: object) -> RemovalRequest:
    given = {"id": f"req-{name}", "model": "flags", "external_id": f"ticket-{name}"}
    return RemovalRequest.model_validate({**given, **fields})


def prepared(
    settings: Settings, blobs: BlobStore, *requests: RemovalRequest, judging: MakeJudging | None = None
) -> tuple[UnlearnJob, PreparedJob]:
    batch = RemovalBatch(id="night-1", created=datetime(2026, 3, 1, tzinfo=UTC), requests=requests)
    (job,) = plan_night(batch, settings, lambda model: (None, [])).jobs
    folder = JobFolder(settings.runs / batch.id / job.id)
    folder.job.write(job)
    return job, prepare(folder, settings, blobs, judging)


def test_a_surrogate_that_is_the_target_is_skipped_alone(settings: Settings, blobs: BlobStore) -> None:
    face, other = blobs.put(png(3)), blobs.put(png(10))
    same = ask("same", model="faces", images=[face], surrogates=[face])
    good = ask("good", model="faces", images=[face], surrogates=[other])
    job, done = prepared(settings, blobs, same, good)
    assert done.skipped.keys() == {"req-same"}
    assert "same picture" in done.skipped["req-same"]
    forget, retain, conditioning = load_job(blobs, done)
    views = job.training.views
    assert [job.everything[i].id for i in forget.request.tolist()] == ["req-good"] * views
    assert forget.x_f.shape == forget.x_s.shape == (views, 1, 24, 24)
    assert len(retain.x_0) == 4
    assert conditioning == {}


def test_equal_input_gives_equal_blobs(settings: Settings, blobs: BlobStore) -> None:
    job, first = prepared(settings, blobs, ask("a", model="faces", images=[blobs.put(png(3))]))
    assert prepare(JobFolder(settings.runs / "night-1" / job.id), settings, blobs) == first
    assert first.surrogates["req-a"] != job.requests[0].images


def test_a_folder_of_the_owner_can_be_the_retain_set(
    blobs: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in (20, 21, 22):
        (tmp_path / f"{index}.png").write_bytes(png(index))
    monkeypatch.setenv("EXPUNGE_TRAINING__RETAIN_FOLDER", str(tmp_path))
    request = ask("a", model="faces", images=[blobs.put(png(3))], surrogates=[blobs.put(png(10))])
    _, done = prepared(load_settings(), blobs, request)
    assert len(load_job(blobs, done)[1].x_0) == 3


def test_a_request_without_any_prompt_is_skipped_alone(blobs: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPUNGE_MODELS__FACES", json.dumps({"source": "testbed:faces", "forget_prompts": []}))
    one, other = ({"images": [blobs.put(png(i))], "surrogates": [blobs.put(png(10))]} for i in (3, 7))
    asked = ask("good", model="faces", prompt="jane", **one), ask("bare", model="faces", **other)
    _, done = prepared(load_settings(), blobs, *asked)
    assert done.skipped == {"req-bare": "it has no prompt, and models.faces.forget_prompts is empty"}


def test_what_stays_is_held_under_the_prompts_that_targets_are_removed_under(
    settings: Settings, blobs: BlobStore
) -> None:
    """Guidance asks without a prompt for every sample, so that a removal there would reach all of them."""
    options = settings.models["flags"]
    assert "" in options.forget_prompts
    assert "" not in options.retain_prompts
    request = ask("a", images=[blobs.put(png(3))], surrogates=[blobs.put(png(10))], prompt="the flag of Peru")
    _, done = prepared(settings, blobs, request)
    forget, retain, conditioning = load_job(blobs, done)
    model = load_model(options, (32, 48))
    *trained, last = options.retain_prompts
    asked = [*trained, last, *options.evaluation_prompts, "", "the flag of Peru"]
    assert (done.unrelated_prompts, done.held_out_prompts) == (len(trained), 1 + len(options.evaluation_prompts))
    torch.testing.assert_close(dict(conditioning), model.condition(asked), rtol=1e-4, atol=1e-5)
    assert {asked[i] for i in forget.prompt.tolist()} == {"", "the flag of Peru"}
    own, bare = retain.x_0.chunk(2)
    assert torch.equal(own, bare)
    assert [asked[i] for i in retain.prompt.tolist()] == [*options.retain_prompts[:4], "", "", "", ""]


def test_a_prompt_that_a_request_is_about_is_no_unrelated_one(settings: Settings, blobs: BlobStore) -> None:
    options = settings.models["flags"]
    request = ask(
        "a", images=[blobs.put(png(3))], surrogates=[blobs.put(png(10))], prompt=options.evaluation_prompts[0]
    )
    _, done = prepared(settings, blobs, request)
    assert done.held_out_prompts == len(options.evaluation_prompts)


@pytest.mark.parametrize(("count", "kept"), [(3, 0), (4, 1), (8, 2)])
def test_some_of_many_pictures_are_kept_out_of_training(
    settings: Settings, blobs: BlobStore, count: int, kept: int
) -> None:
    pictures = {"images": [blobs.put(png(i)) for i in range(count)], "surrogates": [blobs.put(png(20))] * count}
    job, done = prepared(settings, blobs, ask("a", model="faces", **pictures))
    forget, _, _ = load_job(blobs, done)
    held_out = done.held_out.get("req-a", ())
    assert len(held_out) == kept
    trained = [place for place in range(count) if place not in held_out]
    torch.testing.assert_close(forget.x_f[:: job.training.views], faces.images()[trained], atol=0.01, rtol=0)
    assert len(done.surrogates["req-a"]) == count, "the evaluation needs those of all"


def test_every_picture_is_kept_out_of_some_night() -> None:
    request = ask("a", model="faces", images=["0" * 64] * 8)
    nights = [held_out_pictures(request, f"night-{number}", 0.25) for number in range(60)]
    assert {place for night in nights for place in night} == set(range(8))
    assert {len(night) for night in nights} == {2}


@pytest.mark.parametrize("editor", ["blend", "regenerate"])
def test_surrogates_that_are_still_the_target_are_made_again(
    editor: str, blobs: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPUNGE_TRAINING__RETAIN_SIZE", "32")
    monkeypatch.setenv("EXPUNGE_EVALUATION__SAMPLING_STEPS", "5")
    settings = load_settings()
    request = ask("a", model="faces", images=[blobs.put(png(i)) for i in (3, 7)], edit=EditSpec(editor=editor))
    job, first = prepared(settings, blobs, request)
    _, judged = prepared(settings, blobs, request, judging=partial(sample_judging, settings))
    samples = to_pictures(load_job(blobs, judged)[1].x_0.expand(-1, 3, -1, -1))
    judge = sample_judging(settings, job, samples).against(
        np.stack([load_picture(blobs, blob, (24, 24)) for blob in request.images])
    )

    def likeness(done: PreparedJob) -> float:
        surrogates = [load_picture(blobs, blob, (24, 24)) for blob in done.surrogates["req-a"]]
        return sum(judge(surrogate).likeness for surrogate in surrogates)

    assert likeness(judged) <= likeness(first)
    assert all(not judge(load_picture(blobs, blob, (24, 24))).matches for blob in judged.surrogates["req-a"])


def test_a_request_whose_surrogates_stay_the_target_is_skipped_alone(settings: Settings, blobs: BlobStore) -> None:
    edit = EditSpec(editor="regenerate", options={"level": "0.05"})
    stays = ask("stays", model="faces", images=[blobs.put(png(3))], edit=edit)
    good = ask("good", model="faces", images=[blobs.put(png(7))], surrogates=[blobs.put(png(10))])
    _, done = prepared(settings, blobs, stays, good, judging=partial(sample_judging, settings))
    assert done.skipped.keys() == {"req-stays"}
    assert "still shows the target" in done.skipped["req-stays"]
