"""The adaptive budget: every `probe_every` steps, ask how far each request has to go, and spend the samples there.

A request at `forgotten_at` or beyond leaves the sampling, and returns if a later probe finds it below. When none is
left, training is over. The probe has no memory: it depends on the weights of its step alone, so a resumed training
continues as if it had never stopped.

A probe costs two forward passes per row of the forget set. A step costs four per sample (the frozen model, forward, and
backward, which counts as two). So N rows every k steps of n forget and m retain samples add 2 N / (4 k (n + m)): 3 %
for 10 rows every 10 steps of 8 + 8, and 156 % for 500 rows. Raise `probe_every` as the ledger grows.

Progress says where between target and surrogate the model's estimate lies (`Losses.progress`). How well it separates
the requests that the gate would pass from the others was measured once, over trainings of 7 requests per model on the
testbeds, by a script that was not kept. The area under the curve (0.5 is chance) on `faces` and `flags` was 0.84 and
0.88. It was 0.83 and 0.89 for the ratio |x_hat - x_f| / (|x_hat - x_f| + |x_hat - x_s|) where the two differ, and 0.77
and 0.87 for progress relative to the base model's own. A request for which the base model is already far along is left
out from the start; on the testbeds none was beyond 0.23.

Progress is no verdict, so the budget is off by default. `python -m tests.benchmarks.bench_budget` printed for one seed:
on `flags` a night of 4 requests ended after 80 of 150 steps and kept all verdicts; the next night, warm-started with
one more request, ended after 30, and the new request failed its gate. On `faces` no request reaches 0.6 in 150 steps,
and nothing is saved.
"""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from expunge.preparation.dataset import ForgetSet
from expunge.settings import ShardingSettings
from expunge.unlearning.losses import Losses
from expunge.unlearning.sampling import draw_probe

LEVELS = (0.4, 0.6)
"""Noise levels b / (a + b) of the probe: the ends of the range from which the evaluation re-generates."""


class Budget:
    """Decides for one training. Every rank has its own, probes at the same steps, and arrives at the same numbers."""

    def __init__(
        self,
        losses: Losses,
        sharding: ShardingSettings,
        forget: ForgetSet,
        total: Callable[[Tensor], Tensor],
        rank: int,
        world: int,
    ) -> None:
        """total: sums a tensor over the ranks."""
        self._losses, self._forget, self._total = losses, forget, total
        self._sharding, self._rank, self._world = sharding, rank, world
        self._rows = torch.bincount(forget.request)
        self.missing = torch.ones(len(self._rows), dtype=torch.float64)
        """float64 [R] in [0, 1]: how far each request has to go; 0 if it is forgotten or has no row."""

    @property
    def spent(self) -> bool:
        """True if no request is left to train."""
        return not self.missing.any()

    def probe(self) -> dict[str, float]:
        """Measure the progress of every request. Every rank must call it. The figures returned name no request."""
        began = time.monotonic()
        sums = torch.zeros(len(self._rows), dtype=torch.float64).index_add_(0, self._forget.request, self._progress())
        # A NaN does not count as forgotten: the request stays, and its bad steps are counted against it.
        progress = (sums / self._rows.clamp_min(1)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        there = self._rows > 0
        forgotten = progress >= self._losses.method.forgotten_at
        self.missing = torch.where(there & ~forgotten, 1 - progress.clamp(0, 1), 0.0)
        return {
            "budget/forgotten": float(forgotten.sum()),
            "budget/progress_min": progress[there].min().item(),
            "budget/progress_mean": progress[there].mean().item(),
            "budget/probe_s": time.monotonic() - began,
        }

    def _progress(self) -> Tensor:
        """Return the progress of each row of the forget set, mean over the levels: float64 [N]."""
        method = self._losses.method
        count = len(self._forget.request) * len(LEVELS)
        share = math.ceil(count / self._world)
        values = torch.zeros(count, dtype=torch.float64)
        # All ranks make the same number of passes: ZeRO's stage 3 gathers the weights of each pass from all of them.
        mine = self._rank * share + torch.arange(share)
        for part in mine.split(self._sharding.micro_batch or max(1, method.forget_batch // self._world)):
            row, level = part % count // len(LEVELS), torch.tensor(LEVELS)[part % len(LEVELS)]
            drawn = draw_probe(self._losses.model, method, row, level)
            inside = part < count
            values[part[inside]] = self._losses.progress(self._forget, drawn)[inside]
        # Each number comes from one rank, and the others add 0: the sum is exact in any order.
        return self._total(values).view(-1, len(LEVELS)).mean(1)
