"""The Gaussian path x_t = a x_0 + b eps, and what a network on it predicts: the algebra that every family shares.

A network predicts `alpha eps + beta x_0` on the path (flow: 1, -1; epsilon: 1, 0; v: a, -b). The regression target that
makes it point at a clean endpoint y from x_t = a x_f + b eps is then `c_eps eps + c_f x_f + c_s y`, which gives the
ordinary target back for y = x_f. The noise level of a time is b / (a + b): sigma itself for a rectified flow.

Imports no torch, as `family` explains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Prediction = Literal["flow", "epsilon", "v_prediction"]

MIN_B = 1e-3
"""b (and sigma) are clamped to at least this: the coefficients grow as 1 / b."""


@dataclass(frozen=True)
class PathPoint:
    """The path at one time per sample; all float32 [B]."""

    a: Tensor
    b: Tensor
    alpha: Tensor
    beta: Tensor

    def to(self, device: torch.device | str) -> PathPoint:
        """Return the point on a device."""
        return PathPoint(*(part.to(device) for part in (self.a, self.b, self.alpha, self.beta)))

    @property
    def scales(self) -> Tensor:
        """[B, 2]: (a, b)."""
        return _columns(self.a, self.b)

    @property
    def coefficients(self) -> Tensor:
        """[B, 3]: (c_eps, c_f, c_s)."""
        c_f = self.alpha * self.a / self.b
        return _columns(self.alpha, c_f, self.beta - c_f)

    @property
    def clean_scale(self) -> Tensor:
        """[B]: |d x_0 / d prediction| at fixed x_t, the factor from an error of the prediction to one of the image."""
        return (self.b / (self.b * self.beta - self.a * self.alpha)).abs()

    @property
    def snr(self) -> Tensor:
        """[B]: the signal-to-noise ratio a^2 / b^2."""
        return (self.a / self.b) ** 2

    def noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Return x_t = a x_0 + b eps."""
        a, b = (v.view(-1, *[1] * (clean.ndim - 1)) for v in (self.a, self.b))
        return a * clean + b * noise

    def clean(self, x_t: Tensor, prediction: Tensor) -> Tensor:
        """Return the clean image that a prediction p implies: solves x_t = a x_0 + b eps, p = alpha eps + beta x_0."""
        a, b, alpha, beta = (v.view(-1, *[1] * (x_t.ndim - 1)) for v in (self.a, self.b, self.alpha, self.beta))
        return (b * prediction - alpha * x_t) / (b * beta - a * alpha)


def point(prediction: Prediction, a: Tensor, b: Tensor) -> PathPoint:
    """Make the path's point from `a`, `b`, float32 [B]; b is clamped to MIN_B."""
    b = b.clamp_min(MIN_B)
    one = a.new_ones(a.shape)
    match prediction:
        case "flow":
            alpha, beta = one, -one
        case "epsilon":
            alpha, beta = one, a.new_zeros(a.shape)
        case "v_prediction":
            alpha, beta = a, -b
    return PathPoint(a, b, alpha, beta)


def _columns(*values: Tensor) -> Tensor:
    import torch

    return torch.stack(values, dim=1)
