"""Networks without their weights: built from a config alone, on fake tensors that have shapes and no storage."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from expunge.errors import InputError
from expunge.families import supported
from expunge.families.checks import check
from expunge.families.family import Family
from expunge.families.layout import Layout
from expunge.families.preflight import no_other_error
from expunge.families.source import locate, pinned_source
from expunge.families.supported import family_of
from expunge.settings import ModelSettings, Resolution

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Architecture:
    """A family's network, and what it is called with."""

    family: type[Family]
    network: nn.Module
    blocks: tuple[nn.Module, ...]
    """The modules that gradient checkpointing recomputes one by one."""
    inputs: Mapping[str, Shape]
    """Shapes of one sample, without the batch dimension, the noisy sample first; a scalar is ()."""

    def call(self, batch: int, dtype: torch.dtype) -> Tensor:
        made = {
            name: torch.ones(batch, *shape, dtype=dtype if len(shape) else torch.float32)
            for name, shape in self.inputs.items()
        }
        return self.network(**made).sample


def architecture(name: str, models: Mapping[str, ModelSettings]) -> Architecture:
    """Build the network of a published model, or of a configured one, with weights of torch's default dtype.

    Called, and its result used, under a FakeTensorMode, it allocates nothing.

    Raises InputError where the name is neither, its files are not there, or they do not make a network.
    """
    family = published_family(name)
    if family is not None:
        return family.published_architecture(name)
    layout, resolution = located(name, models)
    with no_other_error(layout.label):
        return family_of(layout).architecture(layout, resolution)


def published_family(name: str) -> type[Family] | None:
    """Find the family that has a published model of this name; None where none has."""
    return next((family for family in supported.FAMILIES if name in family.published), None)


def located(name: str, models: Mapping[str, ModelSettings]) -> tuple[Layout, Resolution]:
    """Find the files of a configured model, and the resolution that it is used at. Raises as `architecture` does."""
    if name not in models:
        published = [name for family in supported.FAMILIES for name in family.published]
        known = ", ".join(sorted({*published, *models}))
        raise InputError(
            f"model: {name!r} is not known", hint=f"use one of {known}, or add [models.{name}] to the config"
        )
    settings = models[name]
    label = f"model {name} ({settings.source})"
    with no_other_error(label):
        layout = locate(pinned_source(settings), label)
        return layout, check(layout, settings.resolution)


def fake_networks(layout: Layout, resolution: Resolution) -> dict[str, dict[str, Shape]]:
    """Pass a picture of `resolution` through a pipeline's networks; nothing is allocated.

    Returns the shapes of the weights that each component needs. Raises InputError where what comes out is not of the
    right shape; whatever diffusers raises where a config does not make a network.
    """
    family = family_of(layout)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = family.architecture(layout, resolution)
        noisy = next(iter(model.inputs.values()))
        _same(layout, family.component, model.call(1, torch.float32), (1, *noisy))
        networks = {family.component: model.network, **family.other_networks(layout, resolution)}
        return {
            name: {key: tuple(value.shape) for key, value in network.named_parameters()}
            for name, network in networks.items()
        }


def pass_through_autoencoder(layout: Layout, name: str, resolution: Resolution, latents: Shape) -> AutoencoderKL:
    """Build the autoencoder that the component `name` is, and pass a picture through it.

    Raises InputError where the latents are not of shape `latents`, [C, H, W], or the picture comes out in another one.
    """
    autoencoder = AutoencoderKL.from_config(dict(layout.config(name).fields))
    assert isinstance(autoencoder, AutoencoderKL)
    pictures = torch.ones(1, 3, *resolution)
    encoded = autoencoder.encode(pictures)
    assert isinstance(encoded, AutoencoderKLOutput)
    made = encoded.latent_dist.mode()
    _same(layout, name, made, (1, *latents))
    decoded = autoencoder.decode(made)
    assert isinstance(decoded, DecoderOutput)
    _same(layout, name, decoded.sample, tuple(pictures.shape))
    return autoencoder


def _same(layout: Layout, name: str, made: Tensor, wanted: Shape) -> None:
    if tuple(made.shape) != wanted:
        raise InputError(
            f"{layout.label}: {name} gives {list(made.shape)} where {list(wanted)} is needed",
            hint="set another resolution, or use another model",
        )
