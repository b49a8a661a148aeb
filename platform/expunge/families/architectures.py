"""A model's network without its weights: from its config alone, on fake tensors that have shapes and no storage."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DModel
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from expunge.errors import InputError
from expunge.families.checks import check, family_of
from expunge.families.preflight import no_other_error
from expunge.families.sd3 import SD3
from expunge.families.source import Layout, locate, pinned_source
from expunge.settings import ModelSettings, Resolution

_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
PUBLISHED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sd3-medium": _MEDIUM,
        "sd3.5-large": {
            **_MEDIUM,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "qk_norm": "rms_norm",
        },
    }
)
"""Transformers of the published checkpoints, so that a plan needs none of their files."""

TEXT_TOKENS = 77 + 256
"""Of an SD3 prompt: CLIP's and, by default, T5's."""


@dataclass(frozen=True)
class Architecture:
    """A network on fake tensors, and what it is called with."""

    component: str
    network: nn.Module
    blocks: tuple[nn.Module, ...]
    """What gradient checkpointing recomputes one by one."""
    lora_targets: tuple[str, ...]
    inputs: Mapping[str, tuple[int, ...]]
    """Shapes of one sample, without the batch dimension; a scalar is ()."""

    def call(self, batch: int, dtype: torch.dtype) -> Tensor:
        made = {
            name: torch.ones(batch, *shape, dtype=dtype if len(shape) else torch.float32)
            for name, shape in self.inputs.items()
        }
        return self.network(**made).sample


def architecture(name: str, models: Mapping[str, ModelSettings]) -> Architecture:
    """Of a published model, or of a configured one. Called, and its result used, under a FakeTensorMode it is without
    storage. The weights have torch's default dtype.

    Raises InputError where the name is neither, its files are not there, or they do not make a network.
    """
    if name in PUBLISHED:
        return _sd3(PUBLISHED[name], TEXT_TOKENS)
    if name not in models:
        known = ", ".join(sorted({*PUBLISHED, *models}))
        raise InputError(
            f"model: {name!r} is not known", hint=f"use one of {known}, or add [models.{name}] to the config"
        )
    settings = models[name]
    label = f"model {name} ({settings.source})"
    with no_other_error(label):
        layout = locate(pinned_source(settings), label)
        return _of_layout(layout, check(layout, settings.resolution))


def fake_networks(layout: Layout, resolution: Resolution) -> dict[str, dict[str, tuple[int, ...]]]:
    """By component, the shapes of the weights that it needs, after a forward pass of it at `resolution`.

    Nothing is allocated. Raises InputError where what comes out is not of the right shape; whatever diffusers raises
    where a config does not make a network.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = _of_layout(layout, resolution)
        noisy = next(iter(model.inputs.values()))
        _same(layout, model.component, tuple(model.call(1, torch.float32).shape), (1, *noisy))
        networks: dict[str, nn.Module] = {model.component: model.network}
        if model.component == "transformer":
            vae = AutoencoderKL.from_config(dict(layout.config("vae").fields))
            assert isinstance(vae, AutoencoderKL)
            pictures = torch.ones(1, 3, *resolution)
            encoded = vae.encode(pictures)
            assert isinstance(encoded, AutoencoderKLOutput)
            latents = encoded.latent_dist.mode()
            _same(layout, "vae", tuple(latents.shape), (1, *noisy))
            decoded = vae.decode(latents)
            assert isinstance(decoded, DecoderOutput)
            _same(layout, "vae", tuple(decoded.sample.shape), tuple(pictures.shape))
            networks["vae"] = vae
        return {
            name: {key: tuple(value.shape) for key, value in network.named_parameters()}
            for name, network in networks.items()
        }


def _same(layout: Layout, name: str, made: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if made != wanted:
        raise InputError(
            f"{layout.label}: {name} gives {list(made)} where {list(wanted)} is needed",
            hint="set another resolution, or use another model",
        )


def _of_layout(layout: Layout, resolution: Resolution) -> Architecture:
    if family_of(layout) == "ddpm":
        return _ddpm(layout.config("unet").fields, resolution)
    factor = 2 ** (len(layout.config("vae").items("block_out_channels")) - 1)
    tokens = layout.config("text_encoder").integer("max_position_embeddings", 77)
    t5 = layout.class_of("text_encoder_3") is not None
    sides = resolution[0] // factor, resolution[1] // factor
    return _sd3(layout.config("transformer").fields, tokens + 256 * t5, sides)


def _sd3(config: Mapping[str, Any], tokens: int, sides: tuple[int, int] | None = None) -> Architecture:
    """sides: height and width in latents; default: the config's own."""
    network = SD3Transformer2DModel.from_config(dict(config))
    assert isinstance(network, SD3Transformer2DModel)
    about = network.config
    inputs = {
        "hidden_states": (int(about["in_channels"]), *(sides or (about["sample_size"], about["sample_size"]))),
        "encoder_hidden_states": (tokens, int(about["joint_attention_dim"])),
        "pooled_projections": (int(about["pooled_projection_dim"]),),
        "timestep": (),
    }
    return Architecture("transformer", network, tuple(network.transformer_blocks), SD3.lora_targets, inputs)


def _ddpm(config: Mapping[str, Any], resolution: Resolution) -> Architecture:
    network = UNet2DModel.from_config(dict(config))
    assert isinstance(network, UNet2DModel)
    blocks = (*network.down_blocks, *([network.mid_block] if network.mid_block else []), *network.up_blocks)
    inputs = {"sample": (int(network.config["in_channels"]), *resolution), "timestep": ()}
    return Architecture("unet", network, blocks, (), inputs)
