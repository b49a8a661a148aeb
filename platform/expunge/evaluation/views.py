"""Views of a picture that training never saw: what is removed must be gone in all of them.

A model that forgot one file, and not what the file shows, still reproduces it mirrored, moved or in another light.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from expunge.preparation.views import resampled

# Strong enough to be other pictures, and so mild that a model still takes them for the one it knows: on `faces`, 10
# pictures at levels 0.3 and 0.5, both encoders, similarity is 0.5 to 0.7 shifted and scaled and 0.6 to 0.8 in the other
# light, where it is 0.7 to 0.9 as submitted. At two to three times the change it is 0.2 to 0.4: no memory is left to
# test. Chosen on this one model.
SCALE, RIGHT = 1.05, 0.04
"""Enlarged by SCALE about the centre, then moved to the right by this fraction of the width."""
CONTRAST, BRIGHTNESS = 0.85, 0.08
"""On [-1, 1]: a flatter and lighter picture."""


def all_views(picture: Tensor) -> Tensor:
    """Return every view of `picture` [3, h, w] in the order of VIEWS: float32 [V, 3, h, w] in [-1, 1]."""
    return torch.cat([view(picture[None]) for view in VIEWS.values()])


def _as_submitted(pictures: Tensor) -> Tensor:
    return pictures


def _mirrored(pictures: Tensor) -> Tensor:
    return pictures.flip(-1)


def _shifted_and_scaled(pictures: Tensor) -> Tensor:
    source = torch.tensor([[1, 0, -2 * RIGHT], [0, 1, 0]], dtype=pictures.dtype) / SCALE
    return resampled(pictures, source).clamp(-1, 1)


def _photometric(pictures: Tensor) -> Tensor:
    return (CONTRAST * pictures + BRIGHTNESS).clamp(-1, 1)


VIEWS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "as submitted": _as_submitted,
    "mirrored": _mirrored,
    "shifted and scaled": _shifted_and_scaled,
    "photometric": _photometric,
}
"""Each maps float32 [N, 3, h, w] in [-1, 1] to the same shape and range, and always in the same way."""
