"""Real pictures of two domains, what ruins them, and a matcher of fixed threshold, for tests that sample nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from expunge.evaluation.encoders import Encoder
from expunge.testbed import faces, flags


def face_pictures() -> Tensor:
    """Return float32 [100, 3, 24, 24], shuffled."""
    return _shuffled(faces.images().expand(-1, 3, -1, -1))


def flag_pictures() -> Tensor:
    """Return float32 [256, 3, 32, 48], shuffled."""
    return _shuffled(flags.images()[0])


def blurred(pictures: Tensor, radius: float) -> Tensor:
    return torch.from_numpy(gaussian_filter(pictures.numpy(), (0, 0, radius, radius), mode="nearest")).float()


def noise_like(pictures: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(pictures.shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


@dataclass(frozen=True)
class FixedMatcher:
    """Matches above one threshold, whatever the encoder."""

    threshold: float = 0.7
    chance: float = 0.02

    def matches(self, similarity: Tensor, names: Sequence[str]) -> Tensor:
        assert similarity.shape[1] == len(names)
        return (similarity >= self.threshold).any(1)


class StandIn(Encoder):
    """An encoder without weights."""

    def __init__(self, reference: str = "") -> None: ...

    @classmethod
    def check(cls, reference: str) -> None: ...

    @classmethod
    def find(cls, reference: str) -> str:
        return ""


class Pixels(StandIn):
    """The pixels themselves."""

    usage = name = "pixels"

    def __call__(self, images: Tensor) -> Tensor:
        return images.flatten(1).float()


class Thumbnails(StandIn):
    """A cheap encoder: the picture at 8 x 8 pixels."""

    usage = name = "thumbnails"

    def __call__(self, images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 8).flatten(1)


class GreyThumbnails(Thumbnails):
    """The same, blind to colour."""

    usage = name = "grey thumbnails"

    def __call__(self, images: Tensor) -> Tensor:
        return super().__call__(images.mean(1, keepdim=True))


def _shuffled(pictures: Tensor) -> Tensor:
    return pictures[torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))].contiguous()
