"""A third family for `test_family.py`, in one file: Stable Diffusion 1, a `UNet2DConditionModel` in latent space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from expunge.families.family import Family
from expunge.families.path import PathPoint, point
from expunge.families.resolution import divisible, own_resolution

if TYPE_CHECKING:
    from diffusers import DDIMScheduler
    from torch import Tensor, nn

    from expunge.families.architectures import Architecture
    from expunge.families.base import Conditioning
    from expunge.families.components import Components
    from expunge.families.layout import Layout
    from expunge.settings import ModelSettings, Resolution

FACTOR = 2
TOKENS = 77


class LatentDiffusion(Family):
    """Time is the step 0 .. T-1."""

    pipelines = ("StableDiffusionPipeline",)
    component = "unet"
    classes = MappingProxyType(
        {
            "unet": ("UNet2DConditionModel",),
            "vae": ("AutoencoderKL",),
            "scheduler": ("DDIMScheduler",),
            "text_encoder": ("CLIPTextModel",),
        }
    )
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    @classmethod
    def check(cls, layout: Layout) -> None:
        unet, vae = layout.config("unet"), layout.config("vae")
        if unet.integer("in_channels", 4) != vae.integer("latent_channels", 4):
            raise unet.refuse("in_channels", "must be the autoencoder's latent_channels")
        layout.config("scheduler").choice("prediction_type", "epsilon", ("epsilon",))

    @classmethod
    def resolution(cls, layout: Layout, configured: Resolution | None) -> Resolution:
        size = layout.config("unet").integer("sample_size", 64) * FACTOR
        resolution = configured or own_resolution(layout, [size, size])
        return divisible(layout, resolution, 2 * FACTOR, "the autoencoder and the UNet halve them once each")

    @classmethod
    def architecture(cls, layout: Layout, resolution: Resolution) -> Architecture:
        from diffusers import UNet2DConditionModel

        from expunge.families.architectures import Architecture

        network = UNet2DConditionModel.from_config(dict(layout.config("unet").fields))
        assert isinstance(network, UNet2DConditionModel)
        inputs = {
            "sample": (int(network.config["in_channels"]), resolution[0] // FACTOR, resolution[1] // FACTOR),
            "timestep": (),
            "encoder_hidden_states": (TOKENS, int(network.config["cross_attention_dim"])),
        }
        return Architecture(cls, network, (*network.down_blocks, *network.up_blocks), inputs)

    @classmethod
    def other_networks(cls, layout: Layout, resolution: Resolution) -> dict[str, nn.Module]:
        from expunge.families.architectures import pass_through_autoencoder

        channels = layout.config("vae").integer("latent_channels", 4)
        latents = (channels, resolution[0] // FACTOR, resolution[1] // FACTOR)
        return {"vae": pass_through_autoencoder(layout, "vae", resolution, latents)}

    def __init__(self, parts: Components, resolution: Resolution, settings: ModelSettings) -> None:
        super().__init__(parts, resolution, settings)
        self.latent_shape = (4, resolution[0] // FACTOR, resolution[1] // FACTOR)
        alpha_bar = cast("DDIMScheduler", parts.other("scheduler")).alphas_cumprod.float()
        self._a, self._b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def encode(self, pictures: Tensor) -> Tensor:
        vae = cast("Any", self.parts.network("vae"))
        return vae.encode(pictures).latent_dist.mode() * vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        vae = cast("Any", self.parts.network("vae"))
        return vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)

    def condition(self, prompts: Sequence[str]) -> Conditioning:
        from expunge.families.text import Texts

        hidden, _ = Texts(self.parts, list(prompts)).clip("")
        return {"encoder_hidden_states": hidden}

    def at(self, time: Tensor) -> PathPoint:
        return point("epsilon", self._a[time], self._b[time])

    def time_at(self, level: Tensor) -> Tensor:
        return ((self._b / (self._a + self._b))[None] - level[:, None]).abs().argmin(1)

    def time_from_uniform(self, u: Tensor) -> Tensor:
        return (u * len(self._a)).long()

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return network(x_t, time, **conditioning).sample

    def times_down(self, first: Tensor, steps: int) -> list[Tensor]:
        import torch

        return list(torch.linspace(first.item(), 0, steps + 1)[:-1].round().long().split(1))

    def save_adapter(self, folder: Path) -> None:
        from diffusers import StableDiffusionPipeline
        from peft import get_peft_model_state_dict

        layers: dict[str, nn.Module | Tensor] = {**get_peft_model_state_dict(self.network)}
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
