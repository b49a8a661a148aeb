"""The shipped models behind the protocol: shapes, levels, round trips, and samplers equal to those of diffusers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from expunge.errors import InputError
from expunge.families import load_model, native_resolution, resolve_source
from expunge.families.base import DiffusionModel, rows
from expunge.families.ddpm import DDPM
from expunge.families.sd3 import SD3
from expunge.settings import ModelSettings
from expunge.testbed import faces as face_data
from expunge.testbed import flags as flag_data


@pytest.fixture(params=["flags", "faces"])
def model(request: pytest.FixtureRequest) -> DiffusionModel:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def flag_pictures() -> Tensor:
    return flag_data.images()[0]


def noise(model: DiffusionModel, count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


def centred(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    return flat - flat.mean(1, keepdim=True)


@pytest.mark.parametrize(("source", "size"), [("testbed:faces", (24, 24)), ("testbed:flags", (48, 48))])
def test_native_resolution(source: str, size: tuple[int, int]) -> None:
    assert native_resolution(ModelSettings(source=source)) == size


@pytest.mark.parametrize(("name", "shape"), [("flags", (8, 8, 12)), ("faces", (1, 24, 24))])
def test_shapes(name: str, shape: tuple[int, int, int], request: pytest.FixtureRequest) -> None:
    model: DiffusionModel = request.getfixturevalue(name)
    assert model.latent_shape == shape
    height, width = model.decode(noise(model, 2)).shape[-2:]
    pictures = model.decode(noise(model, 2))
    assert pictures.shape == (2, 3, height, width)
    assert pictures.abs().max() <= 1
    assert model.encode(pictures).shape == (2, *shape)
    conditioning = rows(model.condition(["", "a flag"]), torch.tensor([0, 1, 1]))
    time = model.time_at(torch.tensor([0.2, 0.5, 0.8]))
    prediction = model.predict(noise(model, 3), time, conditioning)
    assert prediction.shape == (3, *shape)
    assert prediction.dtype == torch.float32


def test_is_frozen_in_evaluation_mode(model: DiffusionModel) -> None:
    assert not model.network.training
    assert not any(p.requires_grad for p in model.network.parameters())


def test_levels_and_times_round_trip(model: DiffusionModel) -> None:
    level = torch.linspace(0.05, 0.95, 19)
    at = model.at(model.time_at(level))
    torch.testing.assert_close(at.b / (at.a + at.b), level, rtol=0, atol=3e-3)


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
def test_uniform_times_stay_on_the_path(model: DiffusionModel, u: float) -> None:
    at = model.at(model.time_from_uniform(torch.tensor([u])))
    assert at.coefficients.isfinite().all()
    assert 0 < at.b.item() <= 1


def test_flags_survive_the_autoencoder(flags: SD3, flag_pictures: Tensor) -> None:
    latents = flags.encode(flag_pictures)
    assert (flags.decode(latents) - flag_pictures).abs().mean().item() < 0.05
    assert latents.std().item() == pytest.approx(1, abs=0.1)
    assert latents.mean().item() == pytest.approx(0, abs=0.05)


def test_encoding_has_no_noise(flags: SD3, flag_pictures: Tensor) -> None:
    assert torch.equal(flags.encode(flag_pictures[:2]), flags.encode(flag_pictures[:2]))


def test_faces_are_their_own_latents(faces: DDPM) -> None:
    pictures = face_data.images()[:4]
    torch.testing.assert_close(faces.encode(faces.decode(pictures)), pictures)


def test_conditioning_depends_on_the_prompt_alone(flags: SD3) -> None:
    together = flags.condition(["a flag", "the flag of Japan"])
    alone = flags.condition(["the flag of Japan"])
    for name, table in together.items():
        torch.testing.assert_close(table[1:], alone[name], rtol=1e-4, atol=1e-5)
        assert (table[0] - table[1]).abs().max() > 0.1


@pytest.mark.parametrize("steps", [4, 10])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_generation_is_the_sd3_pipeline(flags: SD3, steps: int, guidance: float) -> None:
    prompts = ["the flag of Japan", "the flag of Brazil"]
    start = noise(flags, 2)
    pipeline: Any = flags.pipeline
    theirs = pipeline(
        prompt=prompts,
        height=32,
        width=48,
        latents=start.clone(),
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=1,
        output_type="latent",
    ).images
    empty = rows(flags.condition([""]), torch.zeros(2, dtype=torch.long))
    mine = flags.generate(start, flags.condition(prompts), steps=steps, guidance=guidance, empty=empty)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-3)


def test_guidance_leaves_samples_without_a_prompt_alone(flags: SD3, monkeypatch: pytest.MonkeyPatch) -> None:
    start, empty = noise(flags, 3), rows(flags.condition([""]), torch.zeros(3, dtype=torch.long))
    mixed = flags.condition(["", "the flag of Japan", ""])
    mine = flags.generate(start, mixed, steps=3, guidance=2.0, empty=empty)
    plain = flags.generate(start, mixed, steps=3, guidance=1.0, empty=empty)
    torch.testing.assert_close(mine[::2], plain[::2], rtol=0, atol=1e-4)
    assert (mine[1] - plain[1]).abs().max() > 0.1

    asked: list[int] = []
    predict = flags.predict
    monkeypatch.setattr(flags, "predict", lambda x, *more: asked.append(len(x)) or predict(x, *more))
    flags.generate(start, mixed, steps=3, guidance=2.0, empty=empty)
    assert asked == [4, 4, 4], "one of the three is asked about twice"


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_levels_are_the_flow_schedulers(flags: SD3, steps: int, shift: float) -> None:
    config = {**flags.pipeline.scheduler.config, "shift": shift}
    scheduler = type(flags.pipeline.scheduler).from_config(config)
    scheduler.set_timesteps(steps)
    pipeline = flags.pipeline
    kept, pipeline.scheduler = pipeline.scheduler, scheduler
    try:
        shifted = SD3(pipeline, (32, 48), 1)
    finally:
        pipeline.scheduler = kept
    times = torch.cat(shifted._descending(torch.tensor([1000.0]), steps))
    torch.testing.assert_close(times, scheduler.timesteps, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("steps", [5, 20])
def test_denoising_is_ddim(faces: DDPM, steps: int) -> None:
    """The same times, handed to diffusers' deterministic sampler."""
    scheduler: Any = DDIMScheduler.from_config(faces.pipeline.scheduler.config, clip_sample=True, set_alpha_to_one=True)
    times = [int(t) for t in faces._descending(faces.time_at(torch.tensor([1.0])), steps)]
    x = start = noise(faces, 2)
    with torch.no_grad():
        for here, there in zip(times, [*times[1:], -1], strict=True):
            # diffusers derives the next time from an even stride; ours are rounded, so the stride is set at each step.
            scheduler.config.num_train_timesteps, scheduler.num_inference_steps = here - there, 1
            predicted = faces.network(x, torch.full((2,), here)).sample
            x = scheduler.step(predicted, here, x, eta=0.0, use_clipped_model_output=True).prev_sample
    mine = faces.generate(start, {}, steps=steps, guidance=1.0, empty={})
    torch.testing.assert_close(mine, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("level", [0.4, 0.6])
def test_sampling_starts_at_the_level_and_ends_above_clean(model: DiffusionModel, level: float) -> None:
    times = torch.cat(model._descending(model.time_at(torch.tensor([level])), 12))
    at = model.at(times)
    levels = at.b / (at.a + at.b)
    assert levels[0].item() == pytest.approx(level, abs=3e-3)
    assert (levels.diff() < 0).all()
    assert times[-1] > 0
    assert len(times) == 12


def test_training_faces_are_recovered_from_noise(faces: DDPM) -> None:
    x_0 = face_data.images()[:16]
    time = torch.full((16,), 250)
    at = faces.at(time)
    x_t = at.a.view(-1, 1, 1, 1) * x_0 + at.b.view(-1, 1, 1, 1) * noise(faces, 16)
    level = (at.b / (at.a + at.b))[0].item()
    back = faces.denoise(x_t, level, {}, steps=20, guidance=1.0, empty={})
    assert torch.cosine_similarity(centred(back), centred(x_0), dim=1).mean().item() >= 0.85


@pytest.mark.slow
def test_prompts_name_their_flags(flags: SD3, flag_pictures: Tensor) -> None:
    """64 countries; the nearest of all 256 flags in pixel space is the country's own, or one that looks the same."""
    names = flag_data.images()[1]
    chosen = np.random.default_rng(0).choice(len(names), 64, replace=False)
    conditioning = flags.condition([flag_data.caption(names[i]) for i in chosen])
    empty = rows(flags.condition([""]), torch.zeros(64, dtype=torch.long))
    latents = flags.generate(noise(flags, 64), conditioning, steps=20, guidance=2.0, empty=empty)
    nearest = torch.cdist(flags.decode(latents).flatten(1), flag_pictures.flatten(1)).argmin(1)
    same = [torch.equal(flag_pictures[n], flag_pictures[i]) for n, i in zip(nearest.tolist(), chosen, strict=True)]
    assert sum(same) / 64 >= 0.9


def _copy(source: str, folder: Path) -> Path:
    return Path(shutil.copytree(resolve_source(source), folder / "model"))


def _without_weights(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def _truncated_weights(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def _without_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


@pytest.mark.parametrize("damage", [_without_weights, _truncated_weights, _without_index])
def test_incomplete_folder(damage: Callable[[Path], None], tmp_path: Path) -> None:
    folder = _copy("testbed:faces", tmp_path)
    damage(folder)
    with pytest.raises(InputError, match="complete diffusers pipeline"):
        load_model(ModelSettings(source=str(folder)), (24, 24))


@pytest.mark.parametrize("damaged", ["model_index.json", "unet/config.json"])
def test_native_resolution_of_an_incomplete_folder(damaged: str, tmp_path: Path) -> None:
    folder = _copy("testbed:faces", tmp_path)
    (folder / damaged).write_text("{")
    with pytest.raises(InputError, match=r"cannot be read \(JSONDecodeError\)"):
        native_resolution(ModelSettings(source=str(folder)))


def test_unsupported_pipeline(tmp_path: Path) -> None:
    folder = _copy("testbed:faces", tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "PNDMPipeline"}))
    options = ModelSettings(source=str(folder))
    with pytest.raises(InputError, match="PNDMPipeline is not supported"):
        native_resolution(options)
    with pytest.raises(InputError, match="PNDMPipeline is not supported"):
        load_model(options, (24, 24))


def test_unsupported_prediction_type(tmp_path: Path) -> None:
    folder = _copy("testbed:faces", tmp_path)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "sample"}))
    with pytest.raises(InputError, match="'sample' is not supported"):
        load_model(ModelSettings(source=str(folder)), (24, 24))


def test_unknown_testbed_model() -> None:
    with pytest.raises(InputError, match="no testbed model 'birds'"):
        resolve_source("testbed:birds")


@pytest.mark.parametrize("source", ["testbed:", "testbed:../models/faces", "testbed:."])
def test_testbed_names_are_names(source: str) -> None:
    with pytest.raises(InputError, match="no testbed model"):
        resolve_source(source)
