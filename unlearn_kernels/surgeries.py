"""Surgeries by name: each chooses the coefficients of a step from the Gram matrix of its gradients.

`none` and `retain_normal` need torch alone, the others TorchJD (the extra `surgeries`). TorchJD's treat all gradients
alike, so the retain gradient loses its conflicting part as well.
"""

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from unlearn_kernels.coefficients import checked_gram, retain_normal, summed

Surgery: TypeAlias = Callable[[Tensor, float], Tensor]
"""From a finite Gram matrix, float64 [K, K], and the forget weight to coefficients, float64 [K]."""


def _pcgrad(gram: Tensor, forget_weight: float) -> Tensor:
    from torchjd.aggregation import PCGradWeighting

    return _of_scaled(PCGradWeighting(), gram, forget_weight)


def _upgrad(gram: Tensor, forget_weight: float) -> Tensor:
    from torchjd.aggregation import UPGradWeighting

    preferred = torch.ones(len(gram), dtype=torch.float64)
    return _of_scaled(UPGradWeighting(pref_vector=preferred), gram, forget_weight)


def _dualproj(gram: Tensor, forget_weight: float) -> Tensor:
    from torchjd.aggregation import DualProjWeighting

    preferred = torch.ones(len(gram), dtype=torch.float64)
    return _of_scaled(DualProjWeighting(pref_vector=preferred), gram, forget_weight)


def _mgda(gram: Tensor, forget_weight: float) -> Tensor:
    from torchjd.aggregation import MGDAWeighting

    return len(gram) * _of_scaled(MGDAWeighting(), gram, forget_weight)


def _cagrad(gram: Tensor, forget_weight: float) -> Tensor:
    from torchjd.aggregation import CAGradWeighting

    # c = 0.5 is the middle of the range that its authors tried.
    return len(gram) * _of_scaled(CAGradWeighting(c=0.5), gram, forget_weight)


def _of_scaled(weighting: Callable[[Tensor], Tensor], gram: Tensor, forget_weight: float) -> Tensor:
    """Choose by TorchJD among the gradients as `none` scales them: for it, all of them weigh the same."""
    scale = summed(gram, forget_weight)
    return scale * weighting(scale[:, None] * gram * scale)


_SURGERIES: Mapping[str, Surgery] = {
    "none": summed,
    "retain_normal": retain_normal,
    "pcgrad": _pcgrad,
    "upgrad": _upgrad,
    "dualproj": _dualproj,
    "mgda": _mgda,
    "cagrad": _cagrad,
}
SURGERIES = tuple(_SURGERIES)
"""The plain sum; the sum without what opposes the retain gradient; PCGrad (arXiv 2001.06782), UPGrad (2406.16232),
DualProj (GEM's projection, 1706.08840), MGDA (1810.04650) and CAGrad (2110.14048)."""


def surgery(name: str, gram: Tensor, forget_weight: float = 1.0, *, seed: int = 0) -> Tensor:
    """Choose coefficients, float64 [K], by one of SURGERIES; the last gradient is the retain gradient.

    Each forget gradient is weighted by forget_weight / (K - 1), so without conflict PCGrad, UPGrad and DualProj give
    the sum that `none` and `retain_normal` give. MGDA and CAGrad choose a mean, which is scaled to a sum. PCGrad takes
    the gradients in random order, decided by `seed` so that all ranks agree; torch's random state stays as it was.
    A Gram matrix that is not finite gives NaN. Raises ValueError for an unknown name or a gram that is not square, and
    ImportError if TorchJD, or a package that it needs for this surgery, is not installed.
    """
    if name not in _SURGERIES:
        raise ValueError(f"surgery: {name!r}, expected one of {', '.join(SURGERIES)}")
    gram = checked_gram(gram)
    if not gram.isfinite().all():
        return torch.full((len(gram),), math.nan, dtype=torch.float64, device="cpu")
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
            return _SURGERIES[name](gram, forget_weight)
    except ImportError as error:
        raise ImportError(f"{name} needs the extra: pip install 'expunge[surgeries]' ({error})") from error
