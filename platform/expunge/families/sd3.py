"""Stable Diffusion 3: an MMDiT on a rectified flow in the latent space of an autoencoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from expunge.errors import InputError
from expunge.families.family import MOST_TIMESTEPS, Family
from expunge.families.path import MIN_B, PathPoint, point
from expunge.families.resolution import divisible, own_resolution
from expunge.families.weights import COMPLETE

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from diffusers import AutoencoderKL, DiffusionPipeline
    from torch import Tensor, nn

    from expunge.families.architectures import Architecture
    from expunge.families.base import Conditioning
    from expunge.families.components import Components
    from expunge.families.layout import Config, Layout
    from expunge.settings import ModelSettings, Resolution

_CLIP, _CLIP_TOKENIZER = ("CLIPTextModelWithProjection",), ("CLIPTokenizer", "CLIPTokenizerFast")

_T5_TOKENS = 256
"""Tokens that T5, or zeros in its place, adds to a prompt by default."""

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
_MEDIUM_3_5 = {
    **_MEDIUM,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
_LARGE = {
    **_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}


class SD3(Family):
    """Time is sigma * num_train_timesteps, as the transformer takes it.

    Latents are (z - shift_factor) * scaling_factor.
    """

    pipelines = ("StableDiffusion3Pipeline",)
    component = "transformer"
    classes = MappingProxyType(
        {
            "transformer": ("SD3Transformer2DModel",),
            "vae": ("AutoencoderKL",),
            "scheduler": ("FlowMatchEulerDiscreteScheduler",),
            "text_encoder": _CLIP,
            "text_encoder_2": _CLIP,
            "text_encoder_3": ("T5EncoderModel", ""),
            "tokenizer": _CLIP_TOKENIZER,
            "tokenizer_2": _CLIP_TOKENIZER,
            "tokenizer_3": ("T5Tokenizer", "T5TokenizerFast", ""),
        }
    )
    published = MappingProxyType({"sd3-medium": _MEDIUM, "sd3.5-medium": _MEDIUM_3_5, "sd3.5-large": _LARGE})
    # Every linear layer of a block, of both streams: after as many steps, 9 of 16 instances are forgotten, and 4 with
    # the attention projections alone, as LoRA is often trained (README of `unlearning`).
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        *("norm1.linear", "norm1_context.linear"),
    )

    @classmethod
    def check(cls, layout: Layout) -> None:
        transformer, vae = layout.config("transformer"), layout.config("vae")
        latents = vae.integer("latent_channels", 4)
        for name in ("in_channels", "out_channels"):
            if transformer.integer(name, 16) != latents:
                raise transformer.refuse(name, f"must be the autoencoder's latent_channels, {latents}")
            if vae.integer(name, 3) != 3:
                raise vae.refuse(name, "a picture has 3 channels")
        vae.positive("scaling_factor", 0.18215)
        if vae.has("shift_factor"):
            vae.number("shift_factor")
        _check_scheduler(layout.config("scheduler"))
        transformer.integer("joint_attention_dim", 4096)
        encoders = [layout.config(name) for name in ("text_encoder", "text_encoder_2")]
        pooled = sum(encoder.integer("projection_dim", 512) for encoder in encoders)
        if transformer.integer("pooled_projection_dim", 2048) != pooled:
            raise transformer.refuse("pooled_projection_dim", f"the text encoders' projection_dim add up to {pooled}")

    @classmethod
    def resolution(cls, layout: Layout, configured: Resolution | None) -> Resolution:
        transformer = layout.config("transformer")
        factor, patch = _downscaling(layout), transformer.integer("patch_size", 2)
        size = transformer.integer("sample_size", 128) * factor
        resolution = configured or own_resolution(layout, [size, size])
        divisible(layout, resolution, factor * patch, f"the autoencoder's {factor} times the patch size {patch}")
        largest = transformer.integer("pos_embed_max_size", 96) * factor * patch
        if max(resolution) > largest:
            why = f"the sides can have up to {largest} pixels, not {max(resolution)}"
            raise transformer.refuse("pos_embed_max_size", why, "set a lower resolution")
        return resolution

    @classmethod
    def architecture(cls, layout: Layout, resolution: Resolution) -> Architecture:
        factor = _downscaling(layout)
        tokens = layout.config("text_encoder").integer("max_position_embeddings", 77)
        if layout.class_of("text_encoder_3") is not None:
            tokens += _T5_TOKENS
        sides = resolution[0] // factor, resolution[1] // factor
        return cls._architecture(layout.config("transformer").fields, tokens, sides)

    @classmethod
    def published_architecture(cls, name: str) -> Architecture:
        config = cls.published[name]
        return cls._architecture(config, 77 + _T5_TOKENS, (config["sample_size"], config["sample_size"]))

    @classmethod
    def _architecture(cls, config: Mapping[str, Any], tokens: int, sides: tuple[int, int]) -> Architecture:
        """sides: height and width in latents."""
        from diffusers import SD3Transformer2DModel

        from expunge.families.architectures import Architecture

        network = SD3Transformer2DModel.from_config(dict(config))
        assert isinstance(network, SD3Transformer2DModel)
        inputs = {
            "hidden_states": (int(network.config["in_channels"]), *sides),
            "encoder_hidden_states": (tokens, int(network.config["joint_attention_dim"])),
            "pooled_projections": (int(network.config["pooled_projection_dim"]),),
            "timestep": (),
        }
        return Architecture(cls, network, tuple(network.transformer_blocks), inputs)

    @classmethod
    def other_networks(cls, layout: Layout, resolution: Resolution) -> dict[str, nn.Module]:
        from expunge.families.architectures import pass_through_autoencoder

        factor = _downscaling(layout)
        sides = resolution[0] // factor, resolution[1] // factor
        channels = layout.config("vae").integer("latent_channels", 4)
        return {"vae": pass_through_autoencoder(layout, "vae", resolution, (channels, *sides))}

    def __init__(self, parts: Components, resolution: Resolution, settings: ModelSettings) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        super().__init__(parts, resolution, settings)
        transformer = parts.layout.config("transformer")
        self._prompt_tokens = settings.prompt_tokens
        self._width = transformer.integer("joint_attention_dim", 4096)
        scheduler = parts.other("scheduler")
        assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        self._scheduler = scheduler
        self._unit = int(scheduler.config["num_train_timesteps"])
        factor = _downscaling(parts.layout)
        self._pixels = math.prod(resolution)
        self.latent_shape = (transformer.integer("in_channels", 16), resolution[0] // factor, resolution[1] // factor)
        self._patches = math.prod(self.latent_shape[1:]) // transformer.integer("patch_size", 2) ** 2

    @property
    def _vae(self) -> AutoencoderKL:
        vae = cast("AutoencoderKL", self.parts.network("vae"))
        fill_in_shift(vae)
        return vae

    def encode(self, pictures: Tensor) -> Tensor:
        from expunge.families.autoencoder import in_chunks

        vae = self._vae
        shift, scale = vae.config["shift_factor"], vae.config["scaling_factor"]
        # The mode, not a sample: x_f and x_s must not differ by the encoder's noise.
        return in_chunks(
            vae, lambda part: (cast("Any", vae.encode(part)).latent_dist.mode() - shift) * scale, pictures, self._pixels
        )

    def decode(self, latents: Tensor) -> Tensor:
        from expunge.families.autoencoder import in_chunks

        vae = self._vae
        shift, scale = vae.config["shift_factor"], vae.config["scaling_factor"]
        return in_chunks(
            vae, lambda part: cast("Any", vae.decode(part / scale + shift)).sample.clamp(-1, 1), latents, self._pixels
        )

    def condition(self, prompts: Sequence[str]) -> Conditioning:
        from expunge.families.text import Texts

        texts = Texts(self.parts, list(prompts))
        (first, pooled), (second, pooled_2) = texts.clip(""), texts.clip("_2")
        return {
            "encoder_hidden_states": texts.joined([first, second], texts.t5(self._prompt_tokens, self._width)),
            "pooled_projections": texts.joined([pooled, pooled_2]),
        }

    def at(self, time: Tensor) -> PathPoint:
        sigma = (time / self._unit).clamp_min(MIN_B)
        return point("flow", 1 - sigma, sigma)

    def time_at(self, level: Tensor) -> Tensor:
        return level * self._unit

    def time_from_uniform(self, u: Tensor) -> Tensor:
        return u.clamp_min(MIN_B) * self._unit

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return network(hidden_states=x_t, timestep=time, **conditioning).sample

    def times_down(self, first: Tensor, steps: int) -> list[Tensor]:
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        # The scheduler's own levels, so that a picture here is the one that the pipeline would make. They are read
        # after `set_timesteps`: it shifts once more what the constructor computes (diffusers#13243).
        about = self._scheduler.config
        mu = None
        if about["use_dynamic_shifting"]:
            ends = about["base_image_seq_len"], about["max_image_seq_len"], about["base_shift"], about["max_shift"]
            mu = calculate_shift(self._patches, *ends)
        self._scheduler.set_timesteps(steps, mu=mu)
        sigma = cast("Tensor", self._scheduler.sigmas)[:-1]
        if not sigma.isfinite().all():
            raise InputError(
                f"the model's scheduler has no levels for {steps} steps", hint="set evaluation.sampling_steps higher"
            )
        # Not below the lowest of them, nor below what `at` tells apart from clean.
        return list((first * sigma).clamp_min(self._unit * min(MIN_B, sigma.min().item())).split(1))

    def save_adapter(self, folder: Path) -> None:
        from diffusers import StableDiffusion3Pipeline
        from peft import get_peft_model_state_dict

        layers: dict[str, nn.Module | Tensor] = {**get_peft_model_state_dict(self.network)}
        StableDiffusion3Pipeline.save_lora_weights(folder, transformer_lora_layers=layers)

    @classmethod
    def read(cls, layout: Layout, variant: str | None, dtype: torch.dtype) -> DiffusionPipeline:
        pipeline = super().read(layout, variant, dtype)
        fill_in_shift(pipeline.components["vae"])
        return pipeline


def fill_in_shift(vae: AutoencoderKL) -> None:
    """Set a shift_factor of null, the default of AutoencoderKL, to 0: SD3's pipelines take it for a number."""
    if vae.config.get("shift_factor", 0) is None:
        vae.register_to_config(shift_factor=0.0)


def _downscaling(layout: Layout) -> int:
    """How many times smaller than a picture its latents are: the autoencoder halves the sides between its blocks."""
    return 2 ** (len(layout.config("vae").items("block_out_channels")) - 1)


def _check_scheduler(config: Config) -> None:
    for name, why in (
        ("stochastic_sampling", "sampling has to be deterministic"),
        ("invert_sigmas", "noise levels must go down"),
    ):
        if config.flag(name):
            raise config.refuse(name, why, "use the scheduler that the model was published with")
    config.integer("num_train_timesteps", 1000, least=2, most=MOST_TIMESTEPS)
    config.positive("shift", 1.0)
    if config.has("shift_terminal") and not 0 < config.number("shift_terminal") < 1:
        raise config.refuse("shift_terminal", "must be between 0 and 1")
    kinds = [f"use_{kind}_sigmas" for kind in ("karras", "exponential", "beta")]
    if sum(config.flag(kind) for kind in kinds) > 1:
        raise InputError(f"{config.where}: only one of {', '.join(kinds)} can be true", hint=COMPLETE)
    if config.flag("use_dynamic_shifting"):
        for name in ("base_shift", "max_shift"):
            config.number(name, 1.0)
        if config.integer("max_image_seq_len", 4096) <= config.integer("base_image_seq_len", 256):
            raise config.refuse("max_image_seq_len", "must be above base_image_seq_len")
        config.choice("time_shift_type", "exponential", ("exponential", "linear"))
