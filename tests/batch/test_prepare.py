"""prepare on the shipped faces: what a job is made of, and that a bad request is skipped alone."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from expunge.batch.plan import plan
from expunge.batch.prepare import prepare
from expunge.requests.blobs import BlobStore, open_blobs
from expunge.requests.imaging import normalise
from expunge.requests.store import RequestStore
from expunge.settings import Settings, load_settings
from expunge.testbed import faces
from expunge.unlearning.dataset import load_job
from expunge.words import PreparedJob, RemovalRequest, UnlearnJob

Ask = Callable[..., RemovalRequest]


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("EXPUNGE_TRAINING__RETAIN_SIZE", "4")
    monkeypatch.setenv("EXPUNGE_EVALUATION__SAMPLING_STEPS", "3")
    return load_settings()


def png(index: int) -> bytes:
    pixels = ((faces.images()[index, 0].numpy() + 1) * 127.5).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(buffer, "PNG")
    return normalise(buffer.getvalue(), field="face", max_pixels=10_000)


@pytest.fixture
def blobs(settings: Settings) -> BlobStore:
    return open_blobs(settings)


def prepared(
    store: RequestStore, settings: Settings, blobs: BlobStore, *requests: RemovalRequest
) -> tuple[UnlearnJob, PreparedJob]:
    for request in requests:
        store.add(request)
    (job,) = plan(store.drain("night-1"), settings, lambda model: (None, [])).jobs
    return job, prepare(job, settings, blobs)


def test_a_surrogate_that_is_the_target_is_skipped_alone(
    store: RequestStore, settings: Settings, blobs: BlobStore, ask: Ask
) -> None:
    face, other = blobs.put(png(3)), blobs.put(png(10))
    same = ask("same", model="faces", images=[face], surrogates=[face])
    good = ask("good", model="faces", images=[face], surrogates=[other])
    job, done = prepared(store, settings, blobs, same, good)
    assert done.skipped.keys() == {"req-same"}
    assert "same picture" in done.skipped["req-same"]
    forget, retain, conditioning = load_job(blobs, done)
    assert [job.everything[i].id for i in forget.request.tolist()] == ["req-good"]
    assert forget.x_f.shape == forget.x_s.shape == (1, 1, 24, 24)
    assert len(retain.x_0) == 4
    assert conditioning == {}


def test_equal_input_gives_equal_blobs(store: RequestStore, settings: Settings, blobs: BlobStore, ask: Ask) -> None:
    job, first = prepared(store, settings, blobs, ask("a", model="faces", images=[blobs.put(png(3))]))
    assert prepare(job, settings, blobs) == first
    assert first.surrogates["req-a"] != job.requests[0].images


def test_a_folder_of_the_owner_can_be_the_retain_set(
    store: RequestStore, blobs: BlobStore, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in (20, 21, 22):
        (tmp_path / f"{index}.png").write_bytes(png(index))
    monkeypatch.setenv("EXPUNGE_TRAINING__RETAIN_FOLDER", str(tmp_path))
    request = ask("a", model="faces", images=[blobs.put(png(3))], surrogates=[blobs.put(png(10))])
    _, done = prepared(store, load_settings(), blobs, request)
    assert len(load_job(blobs, done)[1].x_0) == 3
