"""The cost model against what stages count themselves, and against figures that others state."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from expunge.batch.cost import Hardware, Load, night_calls
from expunge.evaluation.measure import examine, measure
from expunge.families import load_model
from expunge.families.flops import count_flops
from expunge.pixels import to_pictures, to_png
from expunge.preparation.dataset import ForgetSet, RetainSet, store_set, store_tensors
from expunge.requests.blobs import open_blobs
from expunge.requests.imaging import normalise
from expunge.runs.job import JobFolder
from expunge.settings import EvaluationSettings, ModelSettings, NightSettings, TrainingSettings, load_settings
from expunge.testbed import faces
from expunge.types import PreparedJob, RemovalRequest, UnlearnJob
from expunge.unlearning.adapter import export

TOLERANCE = 0.15
"""The levels that a model is given are not known beforehand, and nor is how soon draws decide."""


@dataclass(frozen=True)
class Counted:
    """The passes that `Basis.passes` holds, by stage, and the job that took them."""

    job: UnlearnJob
    examine: int
    evaluate: int


@pytest.fixture
def night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Two faces that the model knows, and a hotfix that returns nothing but noise, so that draws decide early."""
    quick = {"UNSEEN_PICTURES": 16, "GENERATION_SAMPLES": 16, "INTEGRITY_SAMPLES": 16, "SAMPLING_STEPS": 5}
    for name, value in {**quick, "ROBUSTNESS": "off"}.items():
        monkeypatch.setenv(f"EXPUNGE_EVALUATION__{name}", str(value))
    settings = load_settings()
    blobs = open_blobs(settings)
    people = faces.images().expand(-1, 3, -1, -1)
    target, other, surrogate = (
        blobs.put(normalise(to_png(to_pictures(people[place, None])[0]), field="images", max_pixels=10_000))
        for place in (3, 7, 20)
    )
    requests = tuple(
        RemovalRequest(id=f"req-{name}", model="faces", images=(image,), external_id=name)
        for name, image in (("a", target), ("b", other))
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
    folder = JobFolder(tmp_path / job.id)
    folder.job.write(job)
    folder.prepared.write(
        PreparedJob(
            job=job.id,
            forget=store_set(blobs, ForgetSet(rows, rows.flip(0), zeros, torch.arange(2))),
            retain=store_set(blobs, RetainSet(faces.images()[40:42], zeros)),
            conditioning=store_tensors(blobs, {}),
            unrelated_prompts=1,
            surrogates={request.id: (surrogate,) for request in requests},
        )
    )
    baseline = examine(folder, settings, blobs)
    assert not baseline.not_reproduced
    folder.baseline.write(baseline)
    model = load_model(settings.models["faces"], (24, 24))
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    folder.hotfix.write(export(model, job.training, folder.weights, job.id, steps=1))
    basis = measure(folder, settings, blobs).basis
    assert basis is not None
    return Counted(job, baseline.passes, basis.passes - baseline.passes)


def test_predicted_passes_are_those_that_the_evaluation_counts(night: Counted) -> None:
    settings = load_settings()
    model = settings.models["faces"]
    load = Load.of(night.job.requests, model, settings.evaluation)
    least, most = (
        night_calls(load, Load(), model, night.job.training, settings.evaluation, rounds=rounds) for rounds in (1, 3)
    )
    assert night.examine == pytest.approx(most["examine"].passes, rel=TOLERANCE)
    assert least["evaluate"].passes * (1 - TOLERANCE) <= night.evaluate <= most["evaluate"].passes * (1 + TOLERANCE)


def test_the_arithmetic_of_the_readme() -> None:
    """The figures of "What it costs", for 16 requests with one picture each and no prompt."""
    evaluation, training = EvaluationSettings(), TrainingSettings()
    model = ModelSettings(source="testbed:flags")
    sixteen = Load.typical(16, model, evaluation)
    calls = night_calls(sixteen, Load(), model, training, evaluation)
    assert calls["prepare"].passes == 320 * 20
    assert calls["examine"].passes == 3_840 + 12_320 + 2_160 + 16 * 4 * 270
    assert calls["train"].passes == 1_600 * (8 * 4 + 32 * 4)
    assert calls["evaluate"].passes == 2 * 640 + 1_280 + 16 * 60 + 16 * 4 * 270 + 1_200 + 16 * 4 * 270
    later = night_calls(sixteen, Load(), model, training, evaluation, cached=True)
    assert later["examine"].passes == 16 * 4 * 270


def test_guidance_asks_twice_where_a_prompt_is_not_empty() -> None:
    evaluation, training = EvaluationSettings(), TrainingSettings()
    guided = ModelSettings(source="testbed:flags", guidance=5, retain_prompts=("a flag", ""))
    calls = night_calls(Load.typical(1, guided, evaluation, own_prompt=True), Load(), guided, training, evaluation)
    assert calls["prepare"].guided == calls["prepare"].passes / 2
    own = 4 * 270
    assert calls["examine"].guided == 2 * 64 * 20 / 2 + own
    plain = guided.model_copy(update={"guidance": 1.0})
    calls = night_calls(Load.typical(1, plain, evaluation, own_prompt=True), Load(), plain, training, evaluation)
    assert all(each.guided == 0 for each in calls.values())


def test_earlier_removals_cost_their_share() -> None:
    evaluation, training = EvaluationSettings(), TrainingSettings()
    model = ModelSettings(source="testbed:flags")
    new, ledger = Load.typical(4, model, evaluation), Load.typical(100, model, evaluation)
    alone, both = (night_calls(new, earlier, model, training, evaluation, cached=True) for earlier in (Load(), ledger))
    assert both["train"] == alone["train"], "a warm start trains as long as the new requests need"
    assert both["examine"] == alone["examine"], "their base side is remembered"
    assert both["evaluate"].passes - alone["evaluate"].passes == 25 * (60 + 4 * 270 + 4 * 270)


def test_operations_of_sd3_medium_are_those_that_are_published() -> None:
    """One pass at 1024 x 1024 is about 8.9 TFLOP; Stability's T5-XXL encoder has 4.76e9 weights, asked 256 tokens."""
    flops = count_flops("sd3-medium", {})
    assert flops.network == pytest.approx(8.9e12, rel=0.01)
    assert flops.prompt == pytest.approx(2 * 256 * 4.76e9, rel=0.1)
    assert flops.decode > flops.encode > 0


def test_a_configured_model_is_counted_with_the_parts_that_it_has() -> None:
    models = load_settings().models
    pixels, latents = (count_flops(name, models) for name in ("faces", "flags"))
    assert pixels.network > 0 == pixels.encode == pixels.decode == pixels.prompt
    assert min(latents.network, latents.encode, latents.decode, latents.prompt) > 0


def test_hours_and_money_follow_the_rate() -> None:
    night = NightSettings(gpu="h100", utilisation=0.5, price=2)
    eight, none = Hardware.of(8, 4, night, "bf16"), Hardware.of(0, 4, night, "bf16")
    hour = 989e12 * 0.5 * 3600
    assert (eight.unit_hours(hour), eight.hours(hour), eight.money(hour)) == pytest.approx((1, 1 / 8, 2))
    assert none.hours(4e11 * 3600) == pytest.approx(1)
    assert none.money(hour) == 0


def test_loads_add_up() -> None:
    evaluation, model = EvaluationSettings(), ModelSettings(source="testbed:flags")
    one = Load.typical(1, model, evaluation)
    assert one + one + one == Load.typical(3, model, evaluation)
    assert Load.typical(8, model, evaluation, pictures=6).conditions == 8 * 4 * evaluation.pictures
    assert Load().share(0) == Load()
