"""The inner products in which surgery projects: the plain ones, or those under AdamW's preconditioner.

AdamW moves a weight by p times its gradient, p = 1 / (sqrt(v) + eps) with the running mean v of squared gradients. So a
step along g changes the loss of r by -lr <p g, r>, to first order: a projection that makes the plain <g, r> 0 does not
make this 0, and one in the geometry of the optimizer does. The v at hand is that of the step before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.unlearning.engine.shards import Shard
from unlearn_kernels import gram, preconditioned_gram

WARM_UP = 10
"""The number of steps after which v is used: the mean of so few squares is still noise, and after none it is 0."""


@dataclass(frozen=True)
class SecondMoment:
    """AdamW's running mean of squared gradients, this rank's part of it."""

    pieces: Shard
    """As the pieces of a gradient's shard; may be empty before the first step."""
    steps: int
    """The number of optimizer steps in it."""
    beta2: float
    eps: float

    @property
    def correction(self) -> float:
        """The factor by which v is too small, because it began at 0."""
        return 1 - self.beta2**self.steps


def local_grams(shards: Sequence[Shard], group: Sequence[int], moment: SecondMoment | None) -> Tensor:
    """Return this rank's part of a group's Gram matrices, float64 [1, K, K] or, with a second moment, [2, K, K].

    The first is the plain one; surgery projects by the last. Until v has warmed up, both are the plain one.
    """
    pieces = [[shard[i] for i in group] for shard in shards]
    if moment is None:
        return gram(pieces).cpu()[None]
    if moment.steps < WARM_UP:
        return gram(pieces).cpu().expand(2, -1, -1)
    second = [moment.pieces[i] for i in group]
    both = preconditioned_gram(pieces, second, correction=moment.correction, eps=moment.eps)
    return torch.stack(both).cpu()
