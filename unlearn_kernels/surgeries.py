"""Surgeries besides `retain_normal`: coefficients from TorchJD (the extra `surgeries`).

They treat all gradients alike, so the retain gradient loses its conflicting part as well.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from unlearn_kernels.coefficients import checked_gram


def _pcgrad(count: int) -> Callable[[Tensor], Tensor]:
    from torchjd.aggregation import PCGradWeighting

    return PCGradWeighting()


def _upgrad(count: int) -> Callable[[Tensor], Tensor]:
    from torchjd.aggregation import UPGradWeighting

    return UPGradWeighting(pref_vector=torch.ones(count, dtype=torch.float64))


def _dualproj(count: int) -> Callable[[Tensor], Tensor]:
    from torchjd.aggregation import DualProjWeighting

    return DualProjWeighting(pref_vector=torch.ones(count, dtype=torch.float64))


def _mgda(count: int) -> Callable[[Tensor], Tensor]:
    from torchjd.aggregation import MGDAWeighting

    weighting = MGDAWeighting()
    return lambda gram: count * weighting(gram)


def _cagrad(count: int) -> Callable[[Tensor], Tensor]:
    from torchjd.aggregation import CAGradWeighting

    # c = 0.5 is the middle of the range that its authors tried.
    weighting = CAGradWeighting(c=0.5)
    return lambda gram: count * weighting(gram)


_MAKERS = {"pcgrad": _pcgrad, "upgrad": _upgrad, "dualproj": _dualproj, "mgda": _mgda, "cagrad": _cagrad}
SURGERIES = tuple(_MAKERS)
"""PCGrad (arXiv 2001.06782), UPGrad (2406.16232), DualProj (GEM's projection, 1706.08840), MGDA (1810.04650) and
CAGrad (2110.14048)."""


def surgery(name: str, gram: Tensor, forget_weight: float = 1.0, *, seed: int = 0) -> Tensor:
    """Choose coefficients, float64 [K], by one of SURGERIES; the last gradient is the retain gradient.

    Each forget gradient is first weighted by forget_weight / (K - 1), so without conflict PCGrad, UPGrad and DualProj
    give the sum that `retain_normal` gives. MGDA and CAGrad choose a mean, which is scaled to a sum. PCGrad takes the
    gradients in random order, decided by `seed` so that all ranks agree; torch's random state stays as it was.
    A Gram matrix that is not finite gives NaN. Raises ValueError for an unknown name or a gram that is not square, and
    ImportError if TorchJD, or a package that it needs for this surgery, is not installed.
    """
    if name not in _MAKERS:
        raise ValueError(f"surgery: {name!r}, expected one of {', '.join(SURGERIES)}")
    gram = checked_gram(gram)
    count = len(gram)
    if not gram.isfinite().all():
        return torch.full((count,), math.nan, dtype=torch.float64, device="cpu")
    scale = torch.full((count,), forget_weight / max(1, count - 1), dtype=torch.float64, device="cpu")
    scale[-1] = 1
    try:
        choose = _MAKERS[name](count)
    except ImportError as error:
        raise ImportError(f"{name} needs the extra: pip install 'expunge[surgeries]' ({error})") from error
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        return scale * choose(scale[:, None] * gram * scale)
