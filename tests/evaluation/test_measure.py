"""A job is measured before and after its training, on the shipped faces."""

from pathlib import Path

import pytest
import torch

from expunge.evaluation.measure import examine, measure, nothing_to_do
from expunge.families import load_model
from expunge.families.base import DiffusionModel
from expunge.pixels import to_pictures, to_png
from expunge.preparation.dataset import ForgetSet, RetainSet, store_set, store_tensors
from expunge.requests.blobs import BlobStore, open_blobs
from expunge.requests.imaging import normalise
from expunge.runs.job import JobFolder
from expunge.settings import Settings, load_settings
from expunge.testbed import faces
from expunge.types import Evidence, PreparedJob, RemovalRequest, UnlearnJob
from expunge.unlearning.adapter import export

KNOWN, UNSEEN = "known", "unseen"
QUICK = {
    "LEVELS": "[0.4]",
    "SEEDS": "8",
    "UNSEEN_PICTURES": "16",
    "GENERATION_SAMPLES": "16",
    "INTEGRITY_SAMPLES": "16",
    "SAMPLING_STEPS": "5",
    "ROBUSTNESS": "off",
}


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in QUICK.items():
        monkeypatch.setenv(f"EXPUNGE_EVALUATION__{name}", value)
    return load_settings()


@pytest.fixture
def blobs(settings: Settings) -> BlobStore:
    return open_blobs(settings)


@pytest.fixture
def model(settings: Settings) -> DiffusionModel:
    return load_model(settings.models["faces"], (24, 24))


@pytest.fixture
def folder(settings: Settings, blobs: BlobStore, tmp_path: Path) -> JobFolder:
    """One face that the model knows, and one that it cannot: its halves are of two people, upside down."""
    people = faces.images().expand(-1, 3, -1, -1)
    pictures = {
        KNOWN: people[3],
        UNSEEN: torch.cat([people[7, :, :, :12], people[50, :, :, 12:]], dim=-1).flip(1),
        "surrogate": people[20],
    }
    sealed = {
        name: blobs.put(normalise(to_png(to_pictures(picture[None])[0]), field=name, max_pixels=10_000))
        for name, picture in pictures.items()
    }
    requests = tuple(
        RemovalRequest(id=name, model="faces", images=(sealed[name],), external_id=name) for name in (KNOWN, UNSEEN)
    )
    job = UnlearnJob(
        batch="b",
        model="faces",
        source="testbed:faces",
        resolution=(24, 24),
        requests=requests,
        training=settings.training_for("faces"),
    )
    rows, zeros = faces.images()[[3, 7]], torch.zeros(2, dtype=torch.long)
    prepared = PreparedJob(
        job=job.id,
        forget=store_set(blobs, ForgetSet(rows, rows.flip(0), zeros, torch.arange(2))),
        retain=store_set(blobs, RetainSet(faces.images()[40:42], zeros)),
        conditioning=store_tensors(blobs, {}),
        unrelated_prompts=1,
        surrogates={name: (sealed["surrogate"],) for name in (KNOWN, UNSEEN)},
    )
    made = JobFolder(tmp_path / job.id)
    made.job.write(job)
    made.prepared.write(prepared)
    return made


def unchanged(folder: JobFolder, model: DiffusionModel, settings: Settings, blobs: BlobStore) -> Evidence:
    """Measure a hotfix that is the base model."""
    job = folder.job.expect()
    folder.hotfix.write(export(model, job.training, folder.weights, job.id, steps=1))
    return measure(folder, settings, blobs)


def test_what_the_base_model_does_not_reproduce_is_found_before_training(
    folder: JobFolder, settings: Settings, blobs: BlobStore
) -> None:
    baseline = examine(folder, settings, blobs)
    assert baseline.not_reproduced.keys() == {UNSEEN}
    assert baseline.levels == (0.4,)


def test_an_unchanged_model_has_removed_nothing(
    folder: JobFolder, model: DiffusionModel, settings: Settings, blobs: BlobStore
) -> None:
    evidence = unchanged(folder, model, settings, blobs)
    verdicts = {request.request: request.verdict for request in evidence.requests}
    assert verdicts == {KNOWN: "failed", UNSEEN: "not_reproduced"}
    assert evidence.passed == frozenset()
    ratios = [c.ratio for r in evidence.requests for c in r.conditions if c.informative]
    assert ratios == pytest.approx([1.0] * len(ratios), abs=0.01)
    assert evidence.integrity is not None
    assert evidence.integrity.psnr == 100
    assert set(evidence.pictures) == {"unrelated", KNOWN, UNSEEN}
    assert all(blobs.get(picture).startswith(b"\x89PNG") for picture in evidence.pictures.values())


def test_the_base_model_is_asked_once(
    folder: JobFolder, model: DiffusionModel, settings: Settings, blobs: BlobStore
) -> None:
    """What it shows is kept for the nights to come: they differ by the pictures of the report alone."""
    first, second = (unchanged(folder, model, settings, blobs).basis for _ in range(2))
    assert first is not None
    assert second is not None
    assert second.passes < first.passes / 1.5
    for sealed in (settings.home / "cache" / "evaluation").iterdir():
        assert sealed.read_bytes().startswith(b"EXB1"), "pictures of people are never kept in clear"


def test_a_night_of_pictures_that_the_model_does_not_know_has_evidence_without_a_hotfix(
    folder: JobFolder, settings: Settings, blobs: BlobStore
) -> None:
    evidence = nothing_to_do(folder, settings, blobs)
    assert evidence.integrity is None
    assert evidence.passed == frozenset()
