"""DDPM and DDIM: a `UNet2DModel` in pixel space with a discrete schedule; epsilon or v-prediction.

Two layouts occur: a folder for each component, and, as in google/ddpm-*, everything at the repository's root.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from expunge.families.family import MOST_TIMESTEPS, Family
from expunge.families.path import PathPoint, Prediction, point
from expunge.families.resolution import divisible, own_resolution

if TYPE_CHECKING:
    import torch
    from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
    from torch import Tensor, nn

    from expunge.families.architectures import Architecture
    from expunge.families.base import Conditioning
    from expunge.families.components import Components
    from expunge.families.layout import Config, Layout
    from expunge.settings import ModelSettings, Resolution

_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_SPACINGS = ("leading", "trailing", "linspace")
_ZERO_SNR = "at the last step nothing but noise is left, and a predicted epsilon says nothing about the picture"


class DDPM(Family):
    """Time is the integer step 0 .. T-1; there is no prompt, so a conditioning is empty."""

    pipelines = ("DDPMPipeline", "DDIMPipeline")
    component = "unet"
    classes = MappingProxyType({"unet": ("UNet2DModel",), "scheduler": ("DDIMScheduler", "DDPMScheduler")})

    @classmethod
    def check(cls, layout: Layout) -> None:
        unet = layout.config("unet")
        channels = unet.integer("in_channels", 3)
        if channels not in (1, 3):
            raise unet.refuse("in_channels", "a picture has 1 or 3 channels", "use a model of grey or RGB pictures")
        for name in ("num_class_embeds", "class_embed_type"):
            if unet.has(name):
                raise unet.refuse(name, "a class-conditional UNet is not supported", "use an unconditional model")
        outputs = unet.integer("out_channels", 3)
        if outputs == 2 * channels:
            raise unet.refuse("out_channels", "a learned variance is not supported", "use a fixed variance")
        if outputs != channels:
            raise unet.refuse("out_channels", f"must be in_channels, {channels}")
        if unet.text("time_embedding_type", "positional") == "fourier":
            raise unet.refuse("time_embedding_type", "it divides by the time, which is 0 at the last step of a DDPM")
        ddim = layout.kind == "DDIMPipeline" or layout.class_of("scheduler") == "DDIMScheduler"
        _check_scheduler(layout.config("scheduler"), _SCHEDULES if ddim else (*_SCHEDULES, "sigmoid", "laplace"))

    @classmethod
    def resolution(cls, layout: Layout, configured: Resolution | None) -> Resolution:
        unet = layout.config("unet")
        resolution = configured or own_resolution(layout, _sample_size(unet))
        halvings = len(unet.items("down_block_types")) - 1
        return divisible(layout, resolution, 2**halvings, f"the UNet halves them {halvings} times")

    @classmethod
    def architecture(cls, layout: Layout, resolution: Resolution) -> Architecture:
        from diffusers import UNet2DModel

        from expunge.families.architectures import Architecture

        network = UNet2DModel.from_config(dict(layout.config("unet").fields))
        assert isinstance(network, UNet2DModel)
        blocks = (*network.down_blocks, *([network.mid_block] if network.mid_block else []), *network.up_blocks)
        inputs = {"sample": (int(network.config["in_channels"]), *resolution), "timestep": ()}
        return Architecture(cls, network, blocks, inputs)

    @classmethod
    def index_at_root(cls, network: str, scheduler: str) -> dict[str, object] | None:
        if network not in cls.classes["unet"]:
            return None
        return {
            "_class_name": "DDIMPipeline" if scheduler == "DDIMScheduler" else "DDPMPipeline",
            "scheduler": ["diffusers", scheduler],
            "unet": ["diffusers", network],
        }

    @classmethod
    def read(cls, layout: Layout, variant: str | None, dtype: torch.dtype) -> DiffusionPipeline:
        """Read the two components: diffusers has no pipeline for a repository without a model_index.json."""
        from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

        if layout.class_of("unet") not in cls.classes["unet"]:
            return super().read(layout, variant, dtype)
        where = layout.part("unet")
        unet = UNet2DModel.from_pretrained(where, torch_dtype=dtype, use_safetensors=True, variant=variant)
        kind = DDIMScheduler if layout.class_of("scheduler") == "DDIMScheduler" else DDPMScheduler
        scheduler = kind.from_pretrained(layout.part("scheduler"))
        assert isinstance(scheduler, DDIMScheduler | DDPMScheduler)
        # Either pipeline takes either scheduler; a DDIMPipeline turns it into a DDIMScheduler.
        pipeline = DDIMPipeline if layout.kind == "DDIMPipeline" else DDPMPipeline
        return pipeline(unet, scheduler)  # pyright: ignore[reportArgumentType]  # annotated as if with its own alone

    def __init__(self, parts: Components, resolution: Resolution, settings: ModelSettings) -> None:
        from diffusers import DDIMScheduler

        super().__init__(parts, resolution, settings)
        schedule = _schedule(parts)
        self._prediction: Prediction = cast(Prediction, schedule.config["prediction_type"])
        alpha_bar = schedule.alphas_cumprod.float()
        self._a, self._b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        self._level = self._b / (self._a + self._b)
        self._bound = float(schedule.config["clip_sample_range"]) if schedule.config["clip_sample"] else None
        # A DDIM's own sampling is deterministic, so it is followed here. A DDPM's is not, so there is none to follow:
        # it starts at the last time and keeps to the clipped estimate.
        self._ddim = schedule if isinstance(schedule, DDIMScheduler) else None
        self.noise_of_clipped = self._ddim is None
        self._channels = parts.layout.config("unet").integer("in_channels", 3)
        self.latent_shape = (self._channels, *resolution)

    def encode(self, pictures: Tensor) -> Tensor:
        return pictures if self._channels == 3 else pictures.mean(1, keepdim=True)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.expand(-1, 3, -1, -1).clamp(-1, 1)

    def condition(self, prompts: Sequence[str]) -> Conditioning:
        return {}

    def at(self, time: Tensor) -> PathPoint:
        return point(self._prediction, self._a[time], self._b[time])

    def time_at(self, level: Tensor) -> Tensor:
        return (self._level[None] - level[:, None]).abs().argmin(1)

    def time_from_uniform(self, u: Tensor) -> Tensor:
        return (u * len(self._a)).long().clamp_max(len(self._a) - 1)

    def call(self, network: nn.Module, x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return network(x_t, time).sample

    def clip(self, clean: Tensor) -> Tensor:
        return clean if self._bound is None else clean.clamp(-self._bound, self._bound)

    def times_down(self, first: Tensor, steps: int) -> list[Tensor]:
        import torch

        times = torch.linspace(first.item(), 0, steps + 1)[:-1].round().long().unique_consecutive()
        return list(times.split(1))

    def path_down(self, level: Tensor, steps: int) -> list[tuple[Tensor, PathPoint | None]]:
        if self._ddim is None or level < 1:
            return super().path_down(level, steps)
        last = len(self._a) - 1
        self._ddim.set_timesteps(min(steps, last + 1))
        # The stride that diffusers goes by, whether or not it leads to the next of its times.
        stride = (last + 1) // min(steps, last + 1)
        times = cast("Tensor", self._ddim.timesteps).clamp(0, last)
        return [(time, self._after(time - stride)) for time in times.split(1)]

    def _after(self, time: Tensor) -> PathPoint | None:
        """Below the first time lies the clean picture, or, without `set_alpha_to_one`, the first time again."""
        assert self._ddim is not None
        if time < 0 and self._ddim.config["set_alpha_to_one"]:
            return None
        return self.at(time.clamp_min(0))


def _schedule(parts: Components) -> DDIMScheduler | DDPMScheduler:
    """Read the scheduler. A DDIMPipeline turns whatever it is given into a DDIMScheduler."""
    from diffusers import DDIMScheduler, DDPMScheduler

    schedule = parts.other("scheduler")
    if parts.layout.kind == "DDIMPipeline" and isinstance(schedule, DDPMScheduler):
        schedule = DDIMScheduler.from_config(schedule.config)
    assert isinstance(schedule, DDIMScheduler | DDPMScheduler)
    return schedule


def _sample_size(unet: Config) -> list[int]:
    size = unet.fields.get("sample_size")
    if size is None:
        raise unet.refuse("sample_size", "the model has no resolution of its own", "set the model's resolution")
    given = size if isinstance(size, list) else [size, size]
    sides = [side for side in given if isinstance(side, int)]
    if not len(sides) == len(given) == 2:
        why = "must be a whole number, or the height and the width"
        raise unet.refuse("sample_size", why, "set the model's resolution")
    return sides


def _check_scheduler(config: Config, schedules: tuple[str, ...]) -> None:
    prediction = config.text("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise config.refuse("prediction_type", f"{prediction!r} is not supported", "use epsilon or v_prediction")
    steps = config.integer("num_train_timesteps", 1000, least=2, most=MOST_TIMESTEPS)
    if config.text("variance_type", "fixed_small").startswith("learned"):
        raise config.refuse("variance_type", "a learned variance is not supported", "use a fixed variance")
    if config.flag("thresholding"):
        raise config.refuse("thresholding", "dynamic thresholding is not supported", "use clip_sample instead")
    if config.flag("clip_sample", True):
        config.positive("clip_sample_range", 1.0)
    if config.flag("rescale_betas_zero_snr") and prediction == "epsilon":
        raise config.refuse("rescale_betas_zero_snr", _ZERO_SNR, "use a model with v_prediction")
    config.choice("timestep_spacing", "leading", _SPACINGS)
    if config.fields.get("steps_offset", 0) not in (0, 1):
        raise config.refuse("steps_offset", "must be 0 or 1")
    if config.has("trained_betas"):
        _check_trained_betas(config, steps, prediction)
    else:
        config.choice("beta_schedule", "linear", schedules)
    start, end = config.number("beta_start", 0.0001), config.number("beta_end", 0.02)
    if not 0 < start <= end < 1:
        raise config.refuse("beta_end", f"beta_start, {start:g}, and beta_end must grow between 0 and 1")


def _check_trained_betas(config: Config, steps: int, prediction: str) -> None:
    betas = [beta for beta in config.items("trained_betas") if isinstance(beta, int | float) and 0 < beta <= 1]
    if len(betas) != len(config.items("trained_betas")) or len(betas) != steps:
        raise config.refuse("trained_betas", f"must be {steps} numbers above 0 and at most 1")
    if prediction == "epsilon" and 1 in betas:
        raise config.refuse("trained_betas", _ZERO_SNR, "use a model with v_prediction")
