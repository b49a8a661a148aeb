"""The one way in which a pipeline's weights are read: pinned, from safetensors alone, in float32."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    UNet2DModel,
)

from expunge.errors import InputError
from expunge.families.source import Layout, locate
from expunge.families.weights import COMPLETE


def load_pipeline(source: str, label: str | None = None) -> DiffusionPipeline:
    """Any diffusers pipeline: a folder, `~/...`, `testbed:NAME`, or a hub id as `OWNER/NAME@COMMIT`.

    label: what messages call it; default: the model of this source.

    Raises InputError where it is incomplete, has pickles only, or cannot be loaded.
    """
    return load(locate(source, label or f"model {source}", weights=True))


def load(layout: Layout) -> DiffusionPipeline:
    """The pipeline of `layout`, in float32. Raises InputError as `load_pipeline` does."""
    variant = layout.weights().variant
    try:
        if layout.kind in ("DDPMPipeline", "DDIMPipeline") and layout.class_of("unet") == "UNet2DModel":
            return _unconditional(layout, variant)
        pipeline = DiffusionPipeline.from_pretrained(
            layout.folder, dtype=torch.float32, use_safetensors=True, variant=variant, **layout.absent()
        )
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, ImportError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(f"{layout.label}: {first_line}", hint=COMPLETE) from error
    vae = pipeline.components.get("vae")
    if isinstance(vae, AutoencoderKL) and vae.config.get("shift_factor", 0) is None:
        # The default of AutoencoderKL, which the pipelines that shift take for a number.
        vae.register_to_config(shift_factor=0.0)
    return pipeline


def _unconditional(layout: Layout, variant: str | None) -> DDPMPipeline | DDIMPipeline:
    """By its two components: diffusers has no pipeline for a repository without a model_index.json."""
    unet = UNet2DModel.from_pretrained(
        layout.part("unet"), torch_dtype=torch.float32, use_safetensors=True, variant=variant
    )
    kind = DDIMScheduler if layout.class_of("scheduler") == "DDIMScheduler" else DDPMScheduler
    scheduler = kind.from_pretrained(layout.part("scheduler"))
    assert isinstance(scheduler, DDIMScheduler | DDPMScheduler)
    # Each takes the other's scheduler, too: a DDIMPipeline makes a DDIMScheduler of it.
    pipeline = DDIMPipeline if layout.kind == "DDIMPipeline" else DDPMPipeline
    return pipeline(unet, scheduler)  # pyright: ignore[reportArgumentType]  # annotated as if with its own alone
