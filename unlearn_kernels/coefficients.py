"""Surgery on the host: coefficients chosen from the Gram matrix [K, K] alone. The last gradient is the retain gradient.

Everything is float64 on the CPU. A Gram matrix with NaN or infinity gives NaN, never a plausible number.
"""

import math

import torch
from torch import Tensor

VANISHING = 1e-60
"""The smallest <r, r> relative to the largest <g, g>: a coefficient |g| / |r| beyond 1e30 would overflow float32."""


def summed(gram: Tensor, forget_weight: float = 1.0) -> Tensor:
    """Return the coefficients, float64 [K], of `retain + forget_weight * mean_k g_k`: no surgery. K = 1 gives [1].

    Raises ValueError when gram is not square or empty.
    """
    count = len(checked_gram(gram))
    coefficients = torch.full((count,), forget_weight / max(1, count - 1), dtype=torch.float64, device="cpu")
    coefficients[-1] = 1
    return coefficients


def retain_normal(gram: Tensor, forget_weight: float = 1.0) -> Tensor:
    """Choose the coefficients, float64 [K], of `retain + forget_weight * mean_k g_k'`.

    `g_k' = g_k - min(0, <g_k, r>) / <r, r> r` is the forget gradient without the part that opposes the retain gradient
    r. It is PCGrad's projection (Yu et al. 2020, arXiv 2001.06782), but one-sided: the retain gradient never changes.
    So `<g_k', r> >= 0` for every k. If r is 0, or vanishes beside a g_k (VANISHING), there is nothing to protect and
    nothing is projected. K = 1 gives [1].
    Raises ValueError when gram is not square or empty.
    """
    gram = checked_gram(gram)
    if not gram.isfinite().all():
        return torch.full((len(gram),), math.nan, dtype=torch.float64, device="cpu")
    coefficients = summed(gram, forget_weight)
    against, norm = gram[:-1, -1].clamp(max=0).sum(), gram[-1, -1]
    if norm > VANISHING * gram.diagonal().max():
        coefficients[-1] = 1 - coefficients[0] * against / norm
    return coefficients


def clip_coefficient(gram: Tensor, coefficients: Tensor, max_norm: float) -> float:
    """Return `min(1, max_norm / |sum_k c_k g_k|)`, the factor that clips the combination, from `|g|^2 = c^T G c`.

    Rounding may make the quadratic form of a vanishing combination slightly negative: that counts as 0.
    Raises ValueError when the shapes do not agree or max_norm is not positive.
    """
    gram = checked_gram(gram)
    if coefficients.shape != (len(gram),):
        raise ValueError(f"coefficients: shape {tuple(coefficients.shape)}, expected ({len(gram)},)")
    if not max_norm > 0:
        raise ValueError(f"max_norm: {max_norm}, expected a positive number")
    c = coefficients.detach().to("cpu", torch.float64)
    square = (c @ gram @ c).item()
    if not math.isfinite(square):
        return math.nan
    norm = math.sqrt(max(0.0, square))
    return min(1.0, max_norm / norm) if norm > 0 else 1.0


def cosines(gram: Tensor) -> Tensor:
    """Return the cosine of each forget gradient and the retain gradient, float64 [K - 1]; 0 if either gradient is 0."""
    gram = checked_gram(gram)
    norms = gram.diagonal()[:-1].sqrt() * gram[-1, -1].sqrt()
    return torch.where(norms == 0, 0, gram[:-1, -1] / norms)


def conflicts(gram: Tensor) -> Tensor:
    """Tell which forget gradients point against the retain gradient, bool [K - 1]."""
    return checked_gram(gram)[:-1, -1] < 0


def checked_gram(gram: Tensor) -> Tensor:
    """Return the Gram matrix as float64 on the host. Raises ValueError when it is not square, or empty."""
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or len(gram) == 0:
        raise ValueError(f"gram: shape {tuple(gram.shape)}, expected [K, K] with K >= 1")
    return gram.detach().to("cpu", torch.float64)
