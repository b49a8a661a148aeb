"""The trained weights, a LoRA adapter or the whole network, and access to the base model during training."""

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
from expunge.families.weights import FULL_FILE, LORA_FILE
from expunge.files import file_digest
from expunge.settings import MethodSettings, TrainingSettings
from expunge.types import Hotfix
from expunge.unlearning.losses import Frozen


def kind_of(lora_targets: tuple[str, ...], method: MethodSettings) -> Literal["lora", "full"]:
    """Decide whether LoRA or all weights of a model are trained. Raises InputError for LoRA without targets."""
    if method.adapter == "auto":
        return "lora" if lora_targets else "full"
    if method.adapter == "lora" and not lora_targets:
        raise InputError("training.adapter: this family has no LoRA layers", hint="set it to full or auto")
    return method.adapter


def attach(model: DiffusionModel, training: TrainingSettings, warm_start: Path | None) -> Frozen:
    """Make `model.network` trainable, starting from `warm_start` (a hotfix folder) if given.

    Returns a context manager inside which `model.predict` is the base model: with LoRA the same module with its
    adapters off, otherwise a frozen copy of the weights.
    """
    if training.activation_checkpointing:
        _recompute_activations(model.network)
    if kind_of(model.lora_targets, training) == "lora":
        _attach_lora(model, training.lora_rank, warm_start)
        return lambda: _adapters_off(model.network)
    base = copy.deepcopy(model.network)
    if warm_start is not None:
        model.network.load_state_dict(load_file(warm_start / model.component / FULL_FILE))
    model.network.requires_grad_(True)
    return lambda: _swapped(model, base)


def export(model: DiffusionModel, method: MethodSettings, folder: Path, job: str, *, steps: int) -> Hotfix:
    """Write the hotfix of `steps` steps in diffusers' own format; the folder is complete when this returns."""
    kind = kind_of(model.lora_targets, method)
    if kind == "lora":
        model.save_adapter(folder)
        weights = folder / LORA_FILE
    else:
        _as_diffusers(model.network).save_pretrained(folder / model.component)
        weights = folder / model.component / FULL_FILE
    return Hotfix(job=job, kind=kind, path=folder, steps=steps, digest=file_digest(weights))


def _attach_lora(model: DiffusionModel, rank: int, warm_start: Path | None) -> None:
    from peft import LoraConfig, set_peft_model_state_dict

    network = model.network
    if not isinstance(network, PeftAdapterMixin):
        raise InputError("training.adapter: this network takes no LoRA adapter", hint="set it to full")
    network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(model.lora_targets)))
    if warm_start is not None:
        state = load_file(warm_start / LORA_FILE)
        state = {name.removeprefix(f"{model.component}."): value for name, value in state.items()}
        set_peft_model_state_dict(network, state)


def _recompute_activations(network: nn.Module) -> None:
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
