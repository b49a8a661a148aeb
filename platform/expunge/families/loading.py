"""The one way in which a whole pipeline is read: pinned, from safetensors alone, and in one precision.

That is float32, unless its largest network is large and stored in half precision: SD3-medium would take 31 GB.
"""

import torch
from diffusers import DiffusionPipeline

from expunge.errors import InputError, first_line
from expunge.families.components import Components
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
    """Load the pipeline of `layout`. Raises InputError as `load_base` does."""
    weights = layout.weights()
    sizes = {name: sum(path.stat().st_size for path in files) for name, files in weights.files.items()}
    dtype = Components(layout).precision(max(sizes, key=lambda name: sizes[name]))
    family = family_named(layout.kind)
    read = family.read if family else read_pipeline
    try:
        return read(layout, weights.variant, dtype)
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, ImportError) as error:
        raise InputError(f"{layout.label}: {first_line(error).rstrip('.')}", hint=COMPLETE) from error


def read_pipeline(layout: Layout, variant: str | None, dtype: torch.dtype) -> DiffusionPipeline:
    """Read a pipeline in this precision, as its model_index.json says. Raises whatever diffusers raises."""
    return DiffusionPipeline.from_pretrained(
        layout.folder, dtype=dtype, use_safetensors=True, variant=variant, **layout.absent()
    )
