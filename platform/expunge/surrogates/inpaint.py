"""`inpaint`: a diffusers inpainting pipeline repaints the marked part."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from pydantic import Field

from expunge.errors import InputError, first_line
from expunge.surrogates.base import Ellipse, Options, Task, editor, region

MULTIPLE = 16
"""Both sides must be multiples of the autoencoder's factor times the patch size: 8 or 16 for existing models."""


class InpaintOptions(Options):
    model: str = Field(description="an inpainting pipeline: a path, or a hub id as OWNER/NAME@COMMIT", min_length=1)
    prompt: str = Field("", description="what to paint instead")
    steps: int = Field(30, ge=1, le=1000, description="a whole number from 1 to 1000")
    strength: float = Field(1.0, gt=0, le=1, description="above 0 (the target) up to 1 (new)")
    guidance: float = Field(5.0, ge=0, description="0 or more")
    size: int | None = Field(None, ge=16, le=4096, description="pixels of the shorter side the model sees, 16 to 4096")
    ellipse: Ellipse = Field((0.5, 0.52, 0.42, 0.46), description="cx/cy/rx/ry in [0, 1], used if there is no mask")


@editor("inpaint", InpaintOptions)
@dataclass
class Inpaint:
    """Loads the pipeline with the first picture. Pixels outside the mask never change; donors are not used."""

    options: InpaintOptions
    _repaint: Callable[..., Image.Image] | None = field(default=None, init=False)

    def __call__(self, task: Task) -> np.ndarray:
        import torch  # not at the top: checking an edit does not need it, and importing it takes seconds

        target, mask = task.target, region(task.target, task.mask, self.options.ellipse)
        height, width = target.shape[:2]
        size = self._size(height, width)
        if self._repaint is None:
            self._repaint = _load(self.options.model)
        try:
            picture = self._repaint(
                prompt=self.options.prompt,
                image=Image.fromarray(target).resize(size, Image.Resampling.LANCZOS),
                mask_image=Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST),
                width=size[0],
                height=size[1],
                num_inference_steps=self.options.steps,
                strength=self.options.strength,
                guidance_scale=self.options.guidance,
                generator=torch.Generator().manual_seed(task.seed * 1_000_003 + task.attempt),
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise InputError(
                f"edit: {self.options.model} cannot repaint {size[0]}x{size[1]} pixels ({first_line(error)})",
                hint="change edit.options.size, steps or strength, or give a surrogate",
            ) from error
        picture = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        return np.where(mask[..., None], np.asarray(picture), target)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Return the (width, height) that the model sees: the sides, scaled and rounded to multiples of MULTIPLE."""
        scale = (self.options.size or min(height, width)) / min(height, width)
        across, down = (max(MULTIPLE, round(side * scale / MULTIPLE) * MULTIPLE) for side in (width, height))
        return across, down


def _load(model: str) -> Callable[..., Image.Image]:
    import torch
    from diffusers import AutoPipelineForInpainting, StableDiffusion3InpaintPipeline

    from expunge.families.loading import load_base
    from expunge.families.sd3 import fill_in_shift

    label = f"edit.options.model: {model!r} cannot be loaded"
    stored = load_base(model, label)
    try:
        pipeline = AutoPipelineForInpainting.from_pipe(stored)
    except ValueError as error:
        hint = "name the folder or hub id of an inpainting pipeline"
        raise InputError(f"{label}: {first_line(error)}", hint=hint) from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(pipeline, StableDiffusion3InpaintPipeline):
        return _Plain(pipeline)
    fill_in_shift(pipeline.vae)
    return _StableDiffusion3(pipeline)


@dataclass(frozen=True)
class _Plain:
    pipeline: Callable[..., Any]

    def __call__(self, **arguments: object) -> Image.Image:
        return self.pipeline(**arguments).images[0]


@dataclass(frozen=True)
class _StableDiffusion3:
    """Decodes by itself: diffusers' pipeline ignores the autoencoder's shift (diffusers#13611, still so in 0.42.1).

    It is here and not in `families.sd3`, because only the inpainting pipeline does that, and only this editor uses it.
    """

    pipeline: Any

    def __call__(self, **arguments: object) -> Image.Image:
        import torch

        latents = self.pipeline(**arguments, output_type="latent").images
        vae = self.pipeline.vae
        with torch.no_grad():
            pictures = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
        return self.pipeline.image_processor.postprocess(pictures, output_type="pil")[0]
