"""w(t): how much an error at a noise level counts. Each weighting is a function from the path to float32 [B].

The corrected target differs from the ordinary one by `c_s (x_s - x_f)`, which grows without bound as the noise goes to
zero. At high noise x_t says nothing about the instance, so pulling there turns the surrogate into an attractor for
everything. A weighting bounds the first effect and may mute the second. Stated in clean-image space, through
`PathPoint.clean_scale`, it means the same for every family. Where times are drawn is the sampling density's choice
(`sampling.py`), not a weighting's.
"""

import torch
from torch import Tensor

from expunge.families.path import PathPoint
from expunge.settings import MethodSettings


def uniform(point: PathPoint, method: MethodSettings) -> Tensor:
    """Return 1: the network's own loss."""
    return torch.ones_like(point.a)


def x0(point: PathPoint, method: MethodSettings) -> Tensor:
    """Weigh errors equally in clean-image space, up to 4 (b = 2a for epsilon): beyond, estimates are average images."""
    return (point.clean_scale**2).clamp_max(4.0)


def min_snr(point: PathPoint, method: MethodSettings) -> Tensor:
    """Return min(SNR, gamma) in clean-image space (Hang et al., arXiv 2303.09556); epsilon: min(1, gamma b^2 / a^2)."""
    return point.snr.clamp_max(method.min_snr_gamma) * point.clean_scale**2


def band(point: PathPoint, method: MethodSettings) -> Tensor:
    """Return a log-normal in b / a around `band_level`, times min_snr, which bounds it towards zero noise."""
    centre = torch.logit(torch.tensor(method.band_level))
    distance = ((point.b / point.a.clamp_min(1e-6)).log() - centre) / method.band_width
    return torch.exp(-0.5 * distance**2) * min_snr(point, method)


WEIGHTINGS = {"uniform": uniform, "x0": x0, "min_snr": min_snr, "band": band}
