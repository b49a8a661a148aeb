"""`inpaint`: a diffusers inpainting pipeline repaints the marked part."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoPipelineForInpainting, DiffusionPipeline
from PIL import Image
from pydantic import Field

from expunge.errors import InputError
from expunge.surrogates.base import Editor, Ellipse, Options, read_options, region, register

MULTIPLE = 16
"""Both sides have to divide by the autoencoder's factor times the patch size: 8 or 16 for the models there are."""


class InpaintOptions(Options):
    model: str = Field(description="an inpainting pipeline: a path or a hub id", min_length=1)
    prompt: str = Field("", description="what to paint instead")
    steps: int = Field(30, ge=1, le=1000, description="a whole number from 1 to 1000")
    strength: float = Field(1.0, gt=0, le=1, description="above 0 (the target) up to 1 (new)")
    guidance: float = Field(5.0, ge=0, description="0 or more")
    size: int | None = Field(None, ge=16, le=4096, description="pixels of the shorter side the model sees, 16 to 4096")
    ellipse: Ellipse = Field((0.5, 0.52, 0.42, 0.46), description="cx/cy/rx/ry in [0, 1], what changes without a mask")


@register("inpaint")
def inpaint(options: dict[str, str]) -> Editor:
    return Inpaint(read_options(InpaintOptions, options))


@dataclass
class Inpaint:
    """The pipeline is loaded with the first picture. Pixels outside the mask are never changed; donors are not used."""

    options: InpaintOptions
    _pipeline: Callable[..., Any] | None = field(default=None, init=False)

    def __call__(self, target: np.ndarray, *, mask: np.ndarray | None, donors: np.ndarray, seed: int) -> np.ndarray:
        mask = region(target, mask, self.options.ellipse)
        height, width = target.shape[:2]
        size = self._size(height, width)
        result = self._load()(
            prompt=self.options.prompt,
            image=Image.fromarray(target).resize(size, Image.Resampling.LANCZOS),
            mask_image=Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST),
            width=size[0],
            height=size[1],
            num_inference_steps=self.options.steps,
            strength=self.options.strength,
            guidance_scale=self.options.guidance,
            generator=torch.Generator().manual_seed(seed),
        )
        picture = result.images[0].convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        return np.where(mask[..., None], np.asarray(picture), target)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """(width, height) that the model sees: the sides, scaled and rounded to what it can divide."""
        scale = (self.options.size or min(height, width)) / min(height, width)
        across, down = (max(MULTIPLE, round(side * scale / MULTIPLE) * MULTIPLE) for side in (width, height))
        return across, down

    def _load(self) -> Callable[..., Any]:
        if self._pipeline is not None:
            return self._pipeline
        try:
            # A component saved as absent (the T5 of an SD3) has to be said to be absent.
            parts = cast(dict[str, Any], DiffusionPipeline.load_config(self.options.model))
            absent = {name: None for name, part in parts.items() if isinstance(part, list) and part[0] is None}
            # Safetensors only: a request may name the model, and a pickle runs what it likes.
            stored = DiffusionPipeline.from_pretrained(self.options.model, use_safetensors=True, **absent)
            pipeline = AutoPipelineForInpainting.from_pipe(stored)
        except (OSError, ValueError) as error:
            raise InputError(
                f"edit.options.model: {self.options.model!r} cannot be loaded: {error}",
                hint="name the folder or hub id of an inpainting pipeline with safetensors weights",
            ) from None
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
        self._pipeline = pipeline
        return pipeline
