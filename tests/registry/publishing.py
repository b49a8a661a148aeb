"""What the champion of a testbed generates, and what its base model does."""

import numpy as np
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, StableDiffusion3Pipeline

import expunge
from expunge.families.loading import load_base

STEPS = 2


def generated(model: str, *, hotfixed: bool = True) -> np.ndarray:
    """A picture of the registered champion, or of the base model."""
    pipeline: DiffusionPipeline = (
        expunge.load_pipeline(f"models:/{model}@champion") if hotfixed else load_base(f"testbed:{model}")
    )
    draw = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": STEPS, "output_type": "np"}
    if isinstance(pipeline, StableDiffusion3Pipeline):
        return pipeline(prompt="", height=32, width=48, guidance_scale=1.0, **draw).images  # pyright: ignore
    assert isinstance(pipeline, DDPMPipeline)
    return np.asarray(pipeline(**draw).images)  # pyright: ignore
