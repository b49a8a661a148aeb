"""Kernels of gradient-surgery unlearning. Knows nothing of `expunge`, and needs torch alone.

One surgery reads::

    G = gram([forget, retain])                  # all-reduce G here when the shards are spread over ranks
    c = retain_normal(G)
    combine_(retain, [forget, retain], c * clip_coefficient(G, c, max_norm=1.0))

By convention the LAST shard is the retain gradient.
"""

from unlearn_kernels.backends import use_backend
from unlearn_kernels.coefficients import clip_coefficient, conflicts, cosines, retain_normal
from unlearn_kernels.ops import Shard, Shards, axpby_, combine_, gram, noise_and_target, regression_loss, weighted_loss
from unlearn_kernels.weightings import WEIGHTINGS, weighting

__all__ = [
    "WEIGHTINGS",
    "Shard",
    "Shards",
    "axpby_",
    "clip_coefficient",
    "combine_",
    "conflicts",
    "cosines",
    "gram",
    "noise_and_target",
    "regression_loss",
    "retain_normal",
    "use_backend",
    "weighted_loss",
    "weighting",
]
