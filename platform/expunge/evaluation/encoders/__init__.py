"""Frozen image encoders behind one call: similarity is measured in their feature spaces, never in pixels.

An encoder is a subclass of `Encoder` in a module of its own that is named in ENCODERS. The settings look theirs up
there, so these modules import torch, and what an encoder needs, only where it is used.
"""

from collections.abc import Mapping
from functools import cache

from expunge.errors import InputError
from expunge.evaluation.encoders.arcface import ArcFace
from expunge.evaluation.encoders.backbones import CLIP, DINOv2, TransformersEncoder
from expunge.evaluation.encoders.base import Encoder
from expunge.evaluation.encoders.dlib_face import DlibFace
from expunge.evaluation.encoders.edges import Edges
from expunge.evaluation.encoders.efficientnet import EfficientNetLite0
from expunge.evaluation.encoders.sscd import SSCD

__all__ = ["ENCODERS", "USAGE", "Encoder", "TransformersEncoder", "check_encoder", "find_encoder", "load_encoder"]

ENCODERS: Mapping[str, type[Encoder]] = {
    "efficientnet-lite0": EfficientNetLite0,
    "edges": Edges,
    "dlib-face": DlibFace,
    "sscd": SSCD,
    "dinov2": DINOv2,
    "clip": CLIP,
    "arcface": ArcFace,
    "transformers": TransformersEncoder,
}
"""By what stands before the colon in a name of `evaluation.encoders`."""

USAGE = "; ".join(kind.usage for kind in ENCODERS.values())


def check_encoder(name: str) -> str:
    """Return `name`. Raises ValueError where it names no encoder, or one that could change."""
    kind, _, reference = name.partition(":")
    if kind not in ENCODERS:
        raise ValueError(f"there is no such encoder: use {USAGE}")
    ENCODERS[kind].check(reference)
    return name


def find_encoder(name: str) -> str:
    """Say where the encoder's weights are, without loading them. Raises InputError where they are missing."""
    kind, reference = _looked_up(name)
    return kind.find(reference)


@cache
def load_encoder(name: str) -> Encoder:
    """Load the encoder of this name, once per process. Raises InputError where it cannot be."""
    kind, reference = _looked_up(name)
    return kind(reference)


def _looked_up(name: str) -> tuple[type[Encoder], str]:
    try:
        kind, _, reference = check_encoder(name).partition(":")
    except ValueError as error:
        raise InputError(f"evaluation.encoders: {name!r}: {error}", hint="correct the setting") from None
    return ENCODERS[kind], reference
