"""What is measured, on the shipped faces: a hotfix that changes nothing proves nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expunge.evaluation import measure as module
from expunge.evaluation.encoders import load_encoder
from expunge.evaluation.measure import measure
from expunge.families import load_model
from expunge.families.base import DiffusionModel
from expunge.preparation.dataset import ForgetSet, RetainSet, store_set, store_tensors
from expunge.requests.blobs import BlobStore, open_blobs
from expunge.runs.job import JobFolder
from expunge.settings import Settings, load_settings
from expunge.testbed import faces
from expunge.types import Evidence, PreparedJob, RemovalRequest, UnlearnJob
from expunge.unlearning.adapter import export

PROMPTS = ["", "jane doe", "john doe"]
"""The first is the one that unrelated samples are generated for."""
SAMPLES = 6

Generate = Callable[..., Tensor]


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in {"SEEDS": 1, "GENERATION_SAMPLES": SAMPLES, "INTEGRITY_SAMPLES": 6, "SAMPLING_STEPS": 2}.items():
        monkeypatch.setenv(f"EXPUNGE_EVALUATION__{name}", str(value))
    return load_settings()


@pytest.fixture
def blobs(settings: Settings) -> BlobStore:
    return open_blobs(settings)


@pytest.fixture
def model(settings: Settings) -> DiffusionModel:
    return load_model(settings.models["faces"], (24, 24))


@pytest.fixture
def job(settings: Settings) -> UnlearnJob:
    asked = [
        RemovalRequest(id=f"request-{i}", model="faces", images=("0" * 64,), external_id="x", prompt=prompt)
        for i, prompt in enumerate(PROMPTS[1:])
    ]
    training = settings.training_for("faces")
    return UnlearnJob(
        batch="b", model="faces", source="testbed:faces", resolution=(24, 24), requests=tuple(asked), training=training
    )


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], int]]:
    """The prompts and the seed of each call."""
    calls, generate = [], module.generate_latents

    def watched(
        model: DiffusionModel, conditioning: dict[str, Tensor], prompt: Tensor, *, seed: int, **options: object
    ) -> Tensor:
        calls.append((prompt.tolist(), seed))
        return generate(model, conditioning, prompt, seed=seed, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "generate_latents", watched)
    return calls


def unchanged(job: UnlearnJob, model: DiffusionModel, settings: Settings, blobs: BlobStore, out: Path) -> Evidence:
    """Of a hotfix that is the base model; each request is to be removed under its own prompt and under none."""
    people = faces.images()
    prompt, request = torch.tensor([1, 0, 2, 0]), torch.tensor([0, 0, 1, 1])
    forget = ForgetSet(people[[3, 3, 7, 7]], people[[10, 10, 20, 20]], prompt, request)
    prepared = PreparedJob(
        job=job.id,
        forget=store_set(blobs, forget),
        retain=store_set(blobs, RetainSet(people[40:42], torch.zeros(2, dtype=torch.long))),
        conditioning=store_tensors(blobs, {"nothing": torch.zeros(len(PROMPTS), 1)}),
        unrelated_prompts=1,
        surrogates={},
        skipped={},
    )
    folder = JobFolder(out)
    folder.job.write(job)
    folder.prepared.write(prepared)
    folder.hotfix.write(export(model, job.training, folder.weights, job.id, steps=1))
    options, gate = settings.evaluation, settings.gate
    return measure(folder, blobs, model=settings.model(job.model), options=options, gate=gate)


def test_a_hotfix_that_changes_nothing_proves_nothing(
    job: UnlearnJob, model: DiffusionModel, settings: Settings, blobs: BlobStore, tmp_path: Path
) -> None:
    evidence = unchanged(job, model, settings, blobs, tmp_path)
    assert evidence.passed == frozenset()
    for request in evidence.requests:
        assert request.verdict == "failed"
        for figure in (request.shift, request.target, request.surrogate, request.nearest):
            assert figure is not None
            assert figure.after == pytest.approx(figure.base, abs=1e-5)
    assert evidence.integrity.psnr == 100
    assert evidence.integrity.psnr_unrelated < 30
    assert set(evidence.pictures) == {"unrelated", "request-0", "request-1"}


def test_each_prompt_is_sampled_once_and_with_noise_of_its_own(
    job: UnlearnJob,
    model: DiffusionModel,
    settings: Settings,
    blobs: BlobStore,
    generated: list[tuple[list[int], int]],
    tmp_path: Path,
) -> None:
    unchanged(job, model, settings, blobs, tmp_path)
    unrelated, free = generated[:3], generated[3:]
    assert {prompt for prompts, _ in unrelated for prompt in prompts} == {0}, "not under what is to be removed"
    assert [prompts for prompts, _ in free] == [[i] * (SAMPLES // 2) for i in (0, 1, 2) for _ in range(3)]
    seeds = {prompts[0]: {seed for call, seed in free if call == prompts} for prompts, _ in free}
    assert all(len(own) == 2 for own in seeds.values()), "the hotfix and the base model at one, the base at another"
    assert not seeds[0] & seeds[1], "the prompt that all share, and a request's own"
    assert seeds[1] == seeds[2], "whatever else is in the job"


def test_a_prompt_that_two_requests_share_counts_for_both(
    job: UnlearnJob, model: DiffusionModel, settings: Settings, blobs: BlobStore, tmp_path: Path
) -> None:
    """The nearest sample is looked for among those of all prompts of a request, as the reference does it here."""
    evidence = unchanged(job, model, settings, blobs, tmp_path)
    encoder = load_encoder(settings.evaluation.encoder)
    conditioning = {"nothing": torch.zeros(1, 1)}

    def samples(count: int, seed: int) -> Tensor:
        prompt = torch.zeros(count, dtype=torch.long)
        rest = {"steps": 2, "guidance": 1.0, "empty": model.condition([""])}
        return encoder(model.decode(module.generate_latents(model, conditioning, prompt, seed=seed, **rest)))

    centre = samples(6, module.SEED_AFTER).mean(0)
    people = encoder(model.decode(faces.images()[[3, 7]]))
    for index, request in enumerate(evidence.requests):
        own = torch.cat([samples(SAMPLES // 2, module.SEED_AFTER + 10 * place) for place in (0, 1)])
        nearest = torch.nn.functional.cosine_similarity(own - centre, people[index] - centre).max().item()
        assert request.nearest is not None
        assert request.nearest.base == pytest.approx(nearest, abs=1e-4)
