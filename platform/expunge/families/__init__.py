"""The diffusion models behind one small protocol."""

from typing import TYPE_CHECKING

from expunge.errors import InputError
from expunge.families.checks import check
from expunge.families.preflight import deep_preflight, preflight
from expunge.families.source import locate, pinned_source, resolve_source, source_digest
from expunge.settings import ModelSettings, Resolution

if TYPE_CHECKING:
    from expunge.families.base import DiffusionModel

__all__ = [
    "deep_preflight",
    "load_model",
    "native_resolution",
    "pinned_source",
    "preflight",
    "resolve_source",
    "source_digest",
]


def native_resolution(settings: ModelSettings) -> Resolution:
    """(height, width) of the pipeline's own sample size, read from its config files alone.

    Raises InputError where it has none, or where the model is not supported.
    """
    return check(locate(pinned_source(settings), f"model {settings.source}"), None)


def load_model(settings: ModelSettings, resolution: Resolution, digest: str | None = None) -> "DiffusionModel":
    """Load a base model in float32 for one resolution.

    Raises InputError where weights or files are missing, where the model is not supported at this resolution, or where
    its files are not those of `digest`.
    """
    layout = locate(pinned_source(settings), f"model {settings.source}", weights=True)
    check(layout, resolution)
    if digest is not None and layout.digest() != digest:
        raise InputError(
            f"model {settings.source}: its files are not those that the night was planned with",
            hint="give every node the same files, and run the night again",
        )

    from diffusers import DDIMPipeline, DDPMPipeline, StableDiffusion3Pipeline  # not above: it costs seconds

    from expunge.families.ddpm import DDPM
    from expunge.families.loading import load
    from expunge.families.sd3 import SD3

    pipeline = load(layout)
    if isinstance(pipeline, StableDiffusion3Pipeline):
        model = SD3(pipeline, resolution, settings.prompt_tokens)
    else:
        assert isinstance(pipeline, DDPMPipeline | DDIMPipeline)
        model = DDPM(pipeline, resolution)
    model.network.eval().requires_grad_(False)
    return model
