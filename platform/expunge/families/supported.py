"""The model families that the platform supports. To add one, write its file and name its class here."""

from collections.abc import Mapping

from expunge.errors import InputError
from expunge.families.ddpm import DDPM
from expunge.families.family import Family
from expunge.families.layout import Layout
from expunge.families.sd3 import SD3

FAMILIES: tuple[type[Family], ...] = (DDPM, SD3)

_NAMES: Mapping[str, str] = {
    "FluxPipeline": "Flux",
    "Flux2Pipeline": "Flux 2",
    "PixArtSigmaPipeline": "PixArt",
    "QwenImagePipeline": "Qwen-Image",
    "SanaPipeline": "Sana",
    "StableCascadeCombinedPipeline": "Stable Cascade",
    "StableDiffusionPipeline": "Stable Diffusion 1 or 2",
    "StableDiffusionXLPipeline": "Stable Diffusion XL",
}
"""What people call the models of pipelines that are not supported."""


def family_named(pipeline: str) -> type[Family] | None:
    """Find the family of a pipeline class by its name; None where no family has it."""
    return next((family for family in FAMILIES if pipeline in family.pipelines), None)


def family_of(layout: Layout) -> type[Family]:
    """Find the family of a pipeline. Raises InputError where there is none for its class."""
    kind = layout.kind
    family = family_named(kind)
    if family is None:
        known = sorted(name for family in FAMILIES for name in family.pipelines)
        what = f" ({_NAMES[kind]})" if kind in _NAMES else ""
        raise InputError(f"{layout.label}: {kind} is not supported{what}", hint=f"use one of {', '.join(known)}")
    return family
