"""A new family is one file: named in `supported`, it goes the whole way of a model, and nothing else is touched."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from expunge.errors import InputError
from expunge.families import deep_preflight, load_model, preflight, supported
from expunge.families.base import DiffusionModel
from expunge.families.sampler import generate
from expunge.registry import pipelines
from expunge.settings import ModelSettings, TrainingSettings
from expunge.testbed import flags
from expunge.unlearning.adapter import attach, export
from expunge.unlearning.memory import estimates, footprint
from tests.families.latent_diffusion import LatentDiffusion
from tests.families.refusals import SCHEDULER, Refusal

SIZE = (16, 16)
LORA, FULL = TrainingSettings(lora_rank=2), TrainingSettings(adapter="full")


@pytest.fixture(autouse=True)
def _supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supported, "FAMILIES", (*supported.FAMILIES, LatentDiffusion))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with random weights."""
    torch.manual_seed(0)
    tokenizer = flags.build_tokenizer(["a flag", ""])
    text = CLIPTextConfig.from_dict(
        {
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        }
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL.from_config(
        {
            "block_out_channels": (8, 8),
            "norm_num_groups": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 4,
        }
    )
    assert isinstance(vae, AutoencoderKL)
    path = tmp_path_factory.mktemp("latent") / "model"
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(num_train_timesteps=50),  # pyright: ignore[reportArgumentType]  # annotated by an enum
        safety_checker=None,  # pyright: ignore[reportArgumentType]  # optional, annotated as if not
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    ).save_pretrained(path)
    return path


def options(folder: Path) -> ModelSettings:
    return ModelSettings(source=str(folder))


@torch.no_grad()
def ask(model: DiffusionModel) -> Tensor:
    x_t = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return model.predict(x_t, model.time_at(torch.tensor([0.3, 0.7])), model.condition(["a flag", ""]))


@torch.no_grad()
def perturb(model: DiffusionModel) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.network.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_it_is_checked(folder: Path, tmp_path: Path) -> None:
    assert preflight("mine", options(folder)) == SIZE
    assert deep_preflight("mine", options(folder), tmp_path) == SIZE
    refusal = Refusal(SCHEDULER, "prediction_type", "sample", "epsilon")
    with refusal.in_place(folder):
        refusal.is_raised_by(lambda: preflight("mine", options(folder)), f"model mine ({folder})")
    with pytest.raises(InputError, match="multiples of 4"):
        preflight("mine", options(folder).model_copy(update={"resolution": (18, 16)}))


def test_without_it_the_pipeline_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supported, "FAMILIES", supported.FAMILIES[:-1])
    with pytest.raises(InputError, match="StableDiffusionPipeline is not supported"):
        preflight("mine", options(folder))


def test_its_memory_is_planned(folder: Path) -> None:
    counted = [footprint("mine", {"mine": options(folder)}, training, 2) for training in (LORA, FULL)]
    assert counted[0].trained < counted[1].trained == counted[1].parameters
    assert all(estimate.activations > 0 for estimate in estimates(counted[0], gpus=2, requests=1))


def test_it_generates(folder: Path) -> None:
    model = load_model(options(folder), SIZE)
    assert isinstance(model, LatentDiffusion)
    noise, prompts, empty = (
        torch.randn(2, *model.latent_shape),
        model.condition(["a flag", ""]),
        model.condition([""] * 2),
    )
    pictures = model.decode(generate(model, noise, prompts, steps=3, guidance=2.0, empty=empty))
    assert pictures.shape == (2, 3, *SIZE)
    assert model.encode(pictures).shape == noise.shape


@pytest.mark.parametrize("training", [LORA, FULL], ids=["lora", "full"])
def test_its_hotfix_comes_back(
    training: TrainingSettings, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(options(folder), SIZE)
    base = ask(model)
    frozen = attach(model, training, None)
    perturb(model)
    moved = ask(model)
    with frozen():
        assert torch.equal(ask(model), base)
    hotfix = export(model, training, tmp_path, "job", steps=1)

    again = load_model(options(folder), SIZE)
    again.apply_hotfix(again.network, hotfix.kind, hotfix.path)
    torch.testing.assert_close(ask(again), moved, rtol=0, atol=1e-5)

    warm = load_model(options(folder), SIZE)
    attach(warm, training, tmp_path)
    torch.testing.assert_close(ask(warm), moved, rtol=0, atol=1e-5)

    # As a registered version, on the pipeline itself.
    (tmp_path / "expunge.json").write_text(f'{{"source": "{folder}", "kind": "{hotfix.kind}"}}')
    monkeypatch.setattr(pipelines, "download", lambda *_: tmp_path)
    pipeline = pipelines.load_pipeline("models:/mine/1", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    again.network = pipeline.components["unet"]
    torch.testing.assert_close(ask(again), moved, rtol=0, atol=1e-5)
