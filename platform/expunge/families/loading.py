"""The one way in which a pipeline's weights are read: pinned, from safetensors alone, in float32."""

import torch
from diffusers import DiffusionPipeline

from expunge.errors import InputError, first_line
from expunge.families.layout import Layout
from expunge.families.source import locate
from expunge.families.supported import family_named
from expunge.families.weights import COMPLETE


def load_base(source: str, label: str | None = None) -> DiffusionPipeline:
    """Load any diffusers pipeline: a folder, `~/...`, `testbed:NAME`, or a hub id as `OWNER/NAME@COMMIT`.

    label: names it in messages; default: the model of this source.

    Raises InputError where it is incomplete, has pickles only, or cannot be loaded.
    """
    return load(locate(source, label or f"model {source}", weights=True))


def load(layout: Layout) -> DiffusionPipeline:
    """Load the pipeline of `layout` in float32. Raises InputError as `load_base` does."""
    variant = layout.weights().variant
    family = family_named(layout.kind)
    try:
        return family.read(layout, variant) if family else read_pipeline(layout, variant)
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, ImportError) as error:
        raise InputError(f"{layout.label}: {first_line(error).rstrip('.')}", hint=COMPLETE) from error


def read_pipeline(layout: Layout, variant: str | None) -> DiffusionPipeline:
    """Read a pipeline as its model_index.json says. Raises whatever diffusers raises."""
    return DiffusionPipeline.from_pretrained(
        layout.folder, dtype=torch.float32, use_safetensors=True, variant=variant, **layout.absent()
    )
