"""Kernels for unlearning with gradient surgery. They know nothing of `expunge` and need torch alone.

One surgery reads::

    G = gram([forget, retain])                  # all-reduce G here if the gradients are sharded over ranks
    c = retain_normal(G)
    combine_(retain, [forget, retain], c * clip_coefficient(G, c, max_norm=1.0))

By convention the LAST gradient is the retain gradient.
"""

from unlearn_kernels.backends import use_backend
from unlearn_kernels.coefficients import clip_coefficient, conflicts, cosines, retain_normal
from unlearn_kernels.ops import (
    Gradient,
    Gradients,
    axpby_,
    combine_,
    gram,
    noise_and_target,
    preconditioned_gram,
    regression_loss,
    weighted_loss,
)
from unlearn_kernels.surgeries import SURGERIES, surgery

__all__ = [
    "SURGERIES",
    "Gradient",
    "Gradients",
    "axpby_",
    "clip_coefficient",
    "combine_",
    "conflicts",
    "cosines",
    "gram",
    "noise_and_target",
    "preconditioned_gram",
    "regression_loss",
    "retain_normal",
    "surgery",
    "use_backend",
    "weighted_loss",
]
