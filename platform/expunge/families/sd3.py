"""Stable Diffusion 3: an MMDiT on a rectified flow in the latent space of an autoencoder."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from torch import Tensor

from expunge.errors import InputError
from expunge.families.base import Conditioning, DiffusionModel
from expunge.families.path import MIN_B, PathPoint, point


class SD3(DiffusionModel):
    """Time is sigma * num_train_timesteps, as the transformer takes it.

    Latents are (z - shift_factor) * scaling_factor.
    """

    component = "transformer"
    # Every linear layer of a block, of both streams: after as many steps, 9 of 16 instances are forgotten, and 4 with
    # the attention projections alone, as LoRA is often trained (README of `unlearning`).
    lora_targets = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        *("norm1.linear", "norm1_context.linear"),
    )

    def __init__(self, pipeline: StableDiffusion3Pipeline, resolution: tuple[int, int], prompt_tokens: int) -> None:
        self.pipeline = pipeline
        self.network = pipeline.transformer
        self._vae = pipeline.vae
        self._prompt_tokens = prompt_tokens
        self._scheduler = copy.deepcopy(pipeline.scheduler)
        self._unit = int(pipeline.scheduler.config["num_train_timesteps"])
        factor = pipeline.vae_scale_factor
        self.latent_shape = (
            int(pipeline.transformer.config["in_channels"]),
            resolution[0] // factor,
            resolution[1] // factor,
        )
        self._patches = math.prod(self.latent_shape[1:]) // int(pipeline.transformer.config["patch_size"]) ** 2

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        # The mode, not a sample: x_f and x_s must not differ by the encoder's noise.
        latents = self._vae.encode(pictures).latent_dist.mode()
        return (latents - self._vae.config.shift_factor) * self._vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = latents / self._vae.config.scaling_factor + self._vae.config.shift_factor
        return self._vae.decode(latents).sample.clamp(-1, 1)

    @torch.no_grad()
    def condition(self, prompts: Sequence[str]) -> Conditioning:
        texts = list(prompts)
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            texts, texts, texts, do_classifier_free_guidance=False, max_sequence_length=self._prompt_tokens
        )
        return {"encoder_hidden_states": cast(Tensor, embeds), "pooled_projections": cast(Tensor, pooled)}

    def at(self, time: Tensor) -> PathPoint:
        sigma = (time / self._unit).clamp_min(MIN_B)
        return point("flow", 1 - sigma, sigma)

    def time_at(self, level: Tensor) -> Tensor:
        return level * self._unit

    def time_from_uniform(self, u: Tensor) -> Tensor:
        return u.clamp_min(MIN_B) * self._unit

    def predict(self, x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return self.network(hidden_states=x_t, timestep=time, **conditioning).sample

    def save_adapter(self, folder: Path) -> None:
        from peft import get_peft_model_state_dict

        StableDiffusion3Pipeline.save_lora_weights(
            folder, transformer_lora_layers=dict(get_peft_model_state_dict(self.network))
        )

    def _descending(self, first: Tensor, steps: int) -> list[Tensor]:
        # The scheduler's own levels, so that a picture here is the one the pipeline would make. It has them from
        # `set_timesteps` alone: what its constructor computes is shifted once more there (diffusers#13243).
        about = self._scheduler.config
        mu = None
        if about["use_dynamic_shifting"]:
            ends = about["base_image_seq_len"], about["max_image_seq_len"], about["base_shift"], about["max_shift"]
            mu = calculate_shift(self._patches, *ends)
        self._scheduler.set_timesteps(steps, mu=mu)
        sigma = self._scheduler.sigmas[:-1]
        if not sigma.isfinite().all():
            raise InputError(
                f"the model's scheduler has no levels for {steps} steps", hint="set evaluation.sampling_steps higher"
            )
        # Not below the lowest of them, nor below what `at` tells apart from clean.
        return list((first * sigma).clamp_min(self._unit * min(MIN_B, sigma.min().item())).split(1))
