"""Training leaves the base model at hand, and what was trained comes back from disk as it was."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from expunge.errors import InputError
from expunge.families import resolve_source
from expunge.families.base import DiffusionModel
from expunge.families.family import Family
from expunge.families.loading import load_base
from expunge.settings import TrainingSettings
from expunge.unlearning.adapter import FULL_FILE, LORA_FILE, attach, export, kind_of

LORA = TrainingSettings(lora_rank=3)
FULL = TrainingSettings(adapter="full")

Load = Callable[[str], Family]

WAYS = [("flags", LORA), ("flags", FULL), ("faces", FULL)]


@torch.no_grad()
def ask(model: DiffusionModel) -> Tensor:
    x_t = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    time = model.time_at(torch.tensor([0.3, 0.7]))
    return model.predict(x_t, time, model.condition(["a flag", "the flag of Japan"]))


@torch.no_grad()
def perturb(model: DiffusionModel) -> None:
    """As training would: every trainable weight, and no other."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.network.parameters():
        if parameter.requires_grad:
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def trained(model: DiffusionModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("name", "adapter", "kind"), [("flags", "auto", "lora"), ("flags", "full", "full"), ("faces", "auto", "full")]
)
def test_kind(name: str, adapter: str, kind: str, request: pytest.FixtureRequest) -> None:
    training = TrainingSettings.model_validate({"adapter": adapter})
    assert kind_of(request.getfixturevalue(name).lora_targets, training) == kind


def test_a_ddpm_takes_no_lora(faces: DiffusionModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no LoRA layers"):
        kind_of(faces.lora_targets, TrainingSettings(adapter="lora"))
    with pytest.raises(InputError, match="trained in full"):
        faces.save_adapter(tmp_path)


@pytest.mark.parametrize(("name", "training"), WAYS)
def test_export_and_apply(name: str, training: TrainingSettings, fresh: Load, tmp_path: Path) -> None:
    model = fresh(name)
    base = ask(model)
    attach(model, training, None)
    torch.testing.assert_close(ask(model), base, rtol=0, atol=0, msg="an untrained adapter changes nothing")
    perturb(model)
    moved = ask(model)
    assert (moved - base).abs().max().item() > 1e-2
    hotfix = export(model, training, tmp_path / "hotfix", "job", steps=training.steps)
    assert hotfix.kind == kind_of(model.lora_targets, training)

    again = fresh(name)
    again.apply_hotfix(again.network, hotfix.kind, hotfix.path)
    torch.testing.assert_close(ask(again), moved, rtol=0, atol=1e-5)


def test_digest_is_that_of_the_weights(fresh: Load, tmp_path: Path) -> None:
    model = fresh("faces")
    attach(model, FULL, None)
    first = export(model, FULL, tmp_path / "one", "job", steps=FULL.steps)
    second = export(model, FULL, tmp_path / "two", "job", steps=FULL.steps)
    perturb(model)
    third = export(model, FULL, tmp_path / "three", "job", steps=FULL.steps)
    assert first.digest == second.digest != third.digest


@pytest.mark.parametrize(("name", "training"), WAYS)
def test_frozen_is_the_base_model_exactly(name: str, training: TrainingSettings, fresh: Load) -> None:
    model = fresh(name)
    base = ask(model)
    frozen = attach(model, training, None)
    perturb(model)
    before, moved = set(trained(model)), ask(model)
    for _ in range(2):
        with frozen():
            assert torch.equal(ask(model), base)
        assert torch.equal(ask(model), moved)
        assert set(trained(model)) == before, "what was trainable stays trainable"


@pytest.mark.parametrize(("name", "training"), WAYS)
def test_the_adapter_comes_back_when_the_base_model_fails(name: str, training: TrainingSettings, fresh: Load) -> None:
    model = fresh(name)
    frozen = attach(model, training, None)
    perturb(model)
    moved = ask(model)
    with pytest.raises(ZeroDivisionError, match="division"), frozen():
        _ = 1 / 0
    assert torch.equal(ask(model), moved)


@pytest.mark.parametrize(("name", "training"), WAYS)
def test_warm_start(name: str, training: TrainingSettings, fresh: Load, tmp_path: Path) -> None:
    model = fresh(name)
    base = ask(model)
    attach(model, training, None)
    perturb(model)
    export(model, training, tmp_path, "job", steps=training.steps)

    again = fresh(name)
    frozen = attach(again, training, tmp_path)
    left, right = trained(model), trained(again)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    torch.testing.assert_close(ask(again), ask(model), rtol=0, atol=1e-6)
    with frozen():
        assert torch.equal(ask(again), base), "the frozen model is the pristine base, not the warm start"


def test_lora_trains_the_adapter_alone(fresh: Load) -> None:
    model = fresh("flags")
    attach(model, LORA, None)
    names = set(trained(model))
    assert names
    assert all("lora_" in name for name in names)
    layers = {name.split(".lora_")[0] for name in names}
    blocks = fresh("flags").network.get_submodule("transformer_blocks")
    linear = {name for name, layer in blocks.named_modules(prefix="transformer_blocks") if isinstance(layer, nn.Linear)}
    assert layers == linear, "every linear layer of a block, and no other"


def test_an_adapter_of_fewer_layers_will_do(fresh: Load, tmp_path: Path) -> None:
    """A champion from before `lora_targets` grew has such an adapter."""
    model = fresh("flags")
    model.lora_targets = ("to_q", "to_k")
    attach(model, LORA, None)
    perturb(model)
    export(model, LORA, tmp_path, "job", steps=LORA.steps)

    again = fresh("flags")
    attach(again, LORA, tmp_path)
    assert trained(model).keys() < trained(again).keys()
    torch.testing.assert_close(ask(again), ask(model), rtol=0, atol=1e-6)


def test_diffusers_loads_the_adapter(fresh: Load, tmp_path: Path) -> None:
    model = fresh("flags")
    attach(model, LORA, None)
    perturb(model)
    export(model, LORA, tmp_path, "job", steps=LORA.steps)
    assert (tmp_path / LORA_FILE).is_file()

    again = fresh("flags")
    pipeline = load_base(resolve_source("testbed:flags"))
    assert isinstance(pipeline, StableDiffusion3Pipeline)
    pipeline.load_lora_weights(str(tmp_path), weight_name=LORA_FILE)
    again.network = pipeline.transformer
    torch.testing.assert_close(ask(again), ask(model), rtol=0, atol=1e-5)


def test_diffusers_loads_the_full_weights(fresh: Load, tmp_path: Path) -> None:
    model = fresh("faces")
    attach(model, FULL, None)
    perturb(model)
    export(model, FULL, tmp_path, "job", steps=FULL.steps)
    pipeline = load_base(resolve_source("testbed:faces"))
    assert isinstance(pipeline, DDPMPipeline)
    unet = type(pipeline.unet).from_pretrained(tmp_path / "unet")
    saved = load_file(tmp_path / "unet" / FULL_FILE)
    assert saved.keys() == unet.state_dict().keys()
    assert all(torch.equal(unet.state_dict()[name], value) for name, value in model.network.state_dict().items())
