"""What is trained: a LoRA adapter on the network, or all of its weights; and how to ask the base model meanwhile."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file
from torch import nn

from expunge.errors import InputError
from expunge.families.base import DiffusionModel
from expunge.files import file_digest
from expunge.settings import TrainingSettings
from expunge.unlearning.losses import Frozen
from expunge.words import Hotfix

LORA_FILE = "pytorch_lora_weights.safetensors"
FULL_FILE = "diffusion_pytorch_model.safetensors"


def kind_of(model: DiffusionModel, training: TrainingSettings) -> Literal["lora", "full"]:
    if training.adapter == "auto":
        return "lora" if model.lora_targets else "full"
    if training.adapter == "lora" and not model.lora_targets:
        raise InputError("training.adapter: this family has no LoRA layers", hint="set it to full or auto")
    return training.adapter


def attach(model: DiffusionModel, training: TrainingSettings, warm_start: Path | None) -> Frozen:
    """Make `model.network` trainable, from `warm_start` (a hotfix folder) where given.

    Returns a context manager inside which `model.predict` is the base model: with LoRA the same module with its
    adapters off, else a frozen copy of the weights.
    """
    if training.activation_checkpointing:
        _recompute(model.network)
    if kind_of(model, training) == "lora":
        _attach_lora(model.network, model.lora_targets, training.lora_rank, warm_start)
        return lambda: _adapters_off(model.network)
    base = copy.deepcopy(model.network)
    if warm_start is not None:
        model.network.load_state_dict(load_file(warm_start / model.component / FULL_FILE))
    model.network.requires_grad_(True)
    return lambda: _swapped(model, base)


def export(model: DiffusionModel, training: TrainingSettings, folder: Path, job: str, *, steps: int) -> Hotfix:
    """Write the hotfix of `steps` steps in diffusers' own format; the folder is complete when this returns."""
    kind = kind_of(model, training)
    if kind == "lora":
        model.save_adapter(folder)
        weights = folder / LORA_FILE
    else:
        _as_diffusers(model.network).save_pretrained(folder / model.component)
        weights = folder / model.component / FULL_FILE
    return Hotfix(job=job, kind=kind, path=folder, steps=steps, digest=file_digest(weights))


def apply(model: DiffusionModel, hotfix: Hotfix) -> None:
    """Turn a freshly loaded base model into the hotfixed one."""
    if hotfix.kind == "full":
        model.network.load_state_dict(load_file(hotfix.path / model.component / FULL_FILE))
        return
    network = model.network
    if not isinstance(network, PeftAdapterMixin):
        raise InputError("hotfix: a LoRA adapter cannot be put on this network", hint="retrain with adapter = full")
    network.load_lora_adapter(load_file(hotfix.path / LORA_FILE), prefix=model.component)
    # One matrix product a layer instead of three.
    network.fuse_lora()
    network.unload_lora()


def _attach_lora(network: nn.Module, targets: tuple[str, ...], rank: int, warm_start: Path | None) -> None:
    from peft import LoraConfig, set_peft_model_state_dict

    if not isinstance(network, PeftAdapterMixin):
        raise InputError("training.adapter: this network takes no LoRA adapter", hint="set it to full")
    network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)))
    if warm_start is not None:
        state = load_file(warm_start / LORA_FILE)
        state = {name.removeprefix("transformer."): value for name, value in state.items()}
        set_peft_model_state_dict(network, state)


def _recompute(network: nn.Module) -> None:
    mixin = _as_diffusers(network)
    try:
        mixin.enable_gradient_checkpointing()
    except ValueError:
        raise InputError(
            f"training.activation_checkpointing: {type(network).__name__} cannot recompute its activations",
            hint="set it to false",
        ) from None


@contextmanager
def _adapters_off(network: nn.Module) -> Iterator[None]:
    assert isinstance(network, PeftAdapterMixin)
    network.disable_adapters()
    try:
        yield
    finally:
        network.enable_adapters()


@contextmanager
def _swapped(model: DiffusionModel, base: nn.Module) -> Iterator[None]:
    trained = model.network
    model.network = base
    try:
        yield
    finally:
        model.network = trained


def _as_diffusers(network: nn.Module) -> ModelMixin:
    assert isinstance(network, ModelMixin)
    return network
