"""What an encoder is, and what several of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from expunge.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 64  # images per forward pass, which bounds memory whatever the batch size


class Encoder(ABC):
    """Turns images into features, without gradients."""

    usage: ClassVar[str]
    """How `evaluation.encoders` names it, for messages."""
    name: str

    @abstractmethod
    def __init__(self, reference: str) -> None:
        """Load it. reference: what follows the colon in its name.

        Raises InputError where it cannot be loaded.
        """

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Turn float [B, 3, H, W] or [B, 1, H, W] in [-1, 1] into float32 [B, D] on the CPU."""

    @classmethod
    @abstractmethod
    def check(cls, reference: str) -> None:
        """Raise ValueError where there can be no such encoder: without loading, and without asking the hub."""

    @classmethod
    @abstractmethod
    def find(cls, reference: str) -> str:
        """Say where its weights are, without loading them. Raises InputError where they are missing."""


def refuse_reference(name: str, reference: str) -> None:
    """Raise ValueError if something follows the name of an encoder that there is only one of."""
    if reference:
        raise ValueError(f"{name} takes nothing behind its name")


def need_packages(name: str, packages: dict[str, str], install: str) -> None:
    """Raise InputError where a package is missing. packages: what is imported, and what pip calls it."""
    missing = [distribution for module, distribution in packages.items() if find_spec(module) is None]
    if missing:
        raise InputError(f"evaluation.encoders: {name} needs the package {missing[0]}", hint=f"pip install {install}")


def package_folder(module: str) -> Path:
    """Return the folder of an installed package without importing it."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def in_chunks(images: Tensor, size: tuple[int, int], features: Callable[[Tensor], Tensor]) -> Tensor:
    """Encode images [B, 1 or 3, H, W] with `features`, which takes float32 [b, 3, *size] in [-1, 1] with b <= CHUNK.

    Raises ValueError for images of another shape, and for none.
    """
    import torch

    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images must be [B, 3, H, W] or [B, 1, H, W] with B > 0, not {tuple(images.shape)}")
    images = images.detach().float().cpu().expand(-1, 3, -1, -1)
    with torch.inference_mode():
        chunks = [features(_resize(chunk, size)) for chunk in images.split(CHUNK)]
    return torch.cat(chunks).float().clone()  # cloned outside inference mode, so that autograd can use it


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    from torch.nn.functional import interpolate

    if tuple(images.shape[-2:]) == size:
        return images.clamp(-1, 1)
    # Bicubic interpolation overshoots, hence the clamp.
    return interpolate(images, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
