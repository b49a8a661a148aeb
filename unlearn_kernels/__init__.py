"""Kernels of gradient-surgery unlearning. Knows nothing of `expunge`, and needs torch alone.

One surgery reads::

    G = gram([forget, retain])                  # all-reduce G here when the shards are spread over ranks
    c = retain_normal(G)
    combine_(retain, [forget, retain], c * clip_coefficient(G, c, max_norm=1.0))

By convention the LAST shard is the retain gradient.
"""

from unlearn_kernels.coefficients import clip_coefficient, conflicts, cosines, retain_normal
from unlearn_kernels.ops import Shard, Shards, combine_, gram, noise_and_target, weighted_loss

__all__ = [
    "Shard",
    "Shards",
    "clip_coefficient",
    "combine_",
    "conflicts",
    "cosines",
    "gram",
    "noise_and_target",
    "retain_normal",
    "weighted_loss",
]
