"""A registered hotfix comes back as a pipeline that generates with its weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    UNet2DModel,
)
from torch import nn

from expunge.errors import InputError
from expunge.registry import load_pipeline, uploading, versions
from expunge.registry.tracking import Tracker
from expunge.types import Evidence, Hotfix, Ledger, UnlearnJob
from tests.registry.conftest import KEY


def unet(seed: int) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


def ddpm(folder: Path) -> Path:
    DDPMPipeline(unet(0).half(), DDPMScheduler(50)).save_pretrained(folder)
    return folder


def sd3(folder: Path) -> Path:
    """The testbed's architecture with random weights."""
    from expunge.testbed.flags import build_text_encoder, build_tokenizer, build_transformer, build_vae

    torch.manual_seed(0)
    tokenizer = build_tokenizer(["a flag", ""])
    pipeline = StableDiffusion3Pipeline(
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=build_vae(),
        text_encoder=build_text_encoder(len(tokenizer), 0),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(len(tokenizer), 1),
        tokenizer_2=tokenizer,
        text_encoder_3=None,  # pyright: ignore[reportArgumentType]  # optional, annotated as if not
        tokenizer_3=None,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def published(
    tracker: Tracker, make_job: Callable[..., UnlearnJob], make_evidence: Callable[..., Evidence]
) -> Callable[[Path, Path, str], str]:
    """Registers and promotes a hotfix of the pipeline at `source`; returns the champion's URI."""

    def publish(source: Path, folder: Path, kind: str) -> str:
        job = make_job(source=str(source))
        version = uploading.register(
            tracker,
            job=job,
            hotfix=Hotfix.model_validate({"job": job.id, "kind": kind, "path": folder, "steps": 1, "digest": "d" * 64}),
            evidence=make_evidence(job),
            run_id=tracker.ensure_run(job.model, job.id, params={}, tags={}),
            batch_id="night-1",
            ledger=Ledger(model=job.model, version=None, requests=("r-1",)),
            key=KEY,
        )
        versions.promote(tracker, version)
        return "models:/flags@champion"

    return publish


def test_full_weights_replace_the_network(
    tracker: Tracker, published: Callable[[Path, Path, str], str], tmp_path: Path
) -> None:
    trained = unet(1)
    trained.save_pretrained(tmp_path / "hotfix" / "unet")
    uri = published(ddpm(tmp_path / "base"), tmp_path / "hotfix", "full")
    pipeline = load_pipeline(uri, tracking_uri=tracker.uri)
    assert isinstance(pipeline, DDPMPipeline)
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(pipeline.unet.state_dict()[name], value, msg=name)
    assert pipeline.unet.dtype == torch.float32
    images, *_ = pipeline(num_inference_steps=2, output_type="np", return_dict=False)
    assert np.asarray(images).shape == (1, 8, 8, 1)


def test_the_tracker_and_the_base_come_from_the_settings_or_the_caller(
    tracker: Tracker, published: Callable[[Path, Path, str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet(1).save_pretrained(tmp_path / "hotfix" / "unet")
    base = ddpm(tmp_path / "base")
    published(tmp_path / "moved-away", tmp_path / "hotfix", "full")
    monkeypatch.setenv("EXPUNGE_TRACKING_URI", tracker.uri)
    assert isinstance(load_pipeline("models:/flags/1", base=str(base)), DDPMPipeline)
    with pytest.raises(InputError, match=r"cannot be loaded .* as `base`"):
        load_pipeline("models:/flags/1")


@pytest.mark.parametrize(("kind", "component"), [("lora", "."), ("full", "transformer")])
def test_a_hotfix_of_another_kind_of_pipeline_is_refused(
    tracker: Tracker, published: Callable[[Path, Path, str], str], tmp_path: Path, kind: str, component: str
) -> None:
    folder = tmp_path / "hotfix" / component
    folder.mkdir(parents=True)
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"")
    uri = published(ddpm(tmp_path / "base"), tmp_path / "hotfix", kind)
    with pytest.raises(InputError, match="does not fit DDPMPipeline"):
        load_pipeline(uri, tracking_uri=tracker.uri)


def test_a_lora_adapter_is_applied(
    tracker: Tracker, published: Callable[[Path, Path, str], str], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model_state_dict

    source = sd3(tmp_path / "base")
    trained = StableDiffusion3Pipeline.from_pretrained(
        source, torch_dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
    )
    trained.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    layers: dict[str, nn.Module | torch.Tensor] = {**get_peft_model_state_dict(trained.transformer)}
    StableDiffusion3Pipeline.save_lora_weights(tmp_path / "hotfix", transformer_lora_layers=layers)
    uri = published(source, tmp_path / "hotfix", "lora")

    def output(pipeline: StableDiffusion3Pipeline) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
        with torch.no_grad():
            return pipeline.transformer(
                hidden_states=draw(1, 8, 8, 8),
                timestep=torch.tensor([500.0]),
                encoder_hidden_states=draw(1, 4, 128),
                pooled_projections=draw(1, 128),
            ).sample

    loaded = load_pipeline(uri, tracking_uri=tracker.uri)
    assert isinstance(loaded, StableDiffusion3Pipeline)
    torch.testing.assert_close(output(loaded), output(trained))
    trained.transformer.disable_adapters()
    assert not torch.allclose(output(loaded), output(trained), atol=1e-3)
