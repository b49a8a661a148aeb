"""A model's network without its weights: from its config alone, on fake tensors that have shapes and no storage."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, UNet2DModel
from torch import Tensor, nn

from expunge.errors import InputError
from expunge.families import config_of, pipeline_family, resolve_source
from expunge.families.sd3 import SD3
from expunge.settings import ModelSettings

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

    Raises InputError where the name is neither, or its files are not there.
    """
    if name in PUBLISHED:
        return _sd3(PUBLISHED[name], TEXT_TOKENS)
    if name not in models:
        known = ", ".join(sorted({*PUBLISHED, *models}))
        raise InputError(
            f"model: {name!r} is not known", hint=f"use one of {known}, or add [models.{name}] to the config"
        )
    source = models[name].source
    folder = Path(resolve_source(source))
    if pipeline_family(folder, source) == "sd3":
        clip, t5 = (folder / part / "config.json" for part in ("text_encoder", "text_encoder_3"))
        tokens = int(config_of(clip, source).get("max_position_embeddings", 77))
        return _sd3(config_of(folder / "transformer" / "config.json", source), tokens + 256 * t5.exists())
    return _ddpm(config_of(folder / "unet" / "config.json", source))


def _sd3(config: Mapping[str, Any], tokens: int) -> Architecture:
    network = SD3Transformer2DModel.from_config(dict(config))
    assert isinstance(network, SD3Transformer2DModel)
    size = int(config["sample_size"])
    inputs = {
        "hidden_states": (int(config["in_channels"]), size, size),
        "encoder_hidden_states": (tokens, int(config["joint_attention_dim"])),
        "pooled_projections": (int(config["pooled_projection_dim"]),),
        "timestep": (),
    }
    return Architecture(network, tuple(network.transformer_blocks), SD3.lora_targets, inputs)


def _ddpm(config: Mapping[str, Any]) -> Architecture:
    network = UNet2DModel.from_config(dict(config))
    assert isinstance(network, UNet2DModel)
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    blocks = (*network.down_blocks, *([network.mid_block] if network.mid_block else []), *network.up_blocks)
    return Architecture(network, blocks, (), {"sample": (int(config["in_channels"]), height, width), "timestep": ()})
