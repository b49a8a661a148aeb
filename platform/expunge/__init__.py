"""Expunge: remove specific outputs from trained diffusion models, in nightly batches, with evidence."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["load_pipeline"]


def load_pipeline(uri: str, *, tracking_uri: str | None = None, base: str | None = None) -> "DiffusionPipeline":
    """Load a registered version as a pipeline: see `expunge.registry.load_pipeline`."""
    from expunge.registry.pipelines import load_pipeline

    return load_pipeline(uri, tracking_uri=tracking_uri, base=base)
