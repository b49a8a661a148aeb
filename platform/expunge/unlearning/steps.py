"""One worker's part of a step: for each objective, the micro-batches of its share of the samples."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.preparation.dataset import ForgetSet, RetainSet
from expunge.settings import TrainingSettings
from expunge.unlearning.losses import Losses
from expunge.unlearning.objectives import ForgetObjective, Mode, forget_step, micro_batches
from expunge.unlearning.sampling import Draw, Stream, draw_samples, pick

MicroBatches = list[Callable[[], Tensor]]


@dataclass(frozen=True)
class Steps:
    """Makes the micro-batches of each step."""

    losses: Losses
    training: TrainingSettings
    forget: ForgetSet
    retain: RetainSet
    mode: Mode
    rank: int
    world: int

    def __call__(
        self, step: int, missing: Tensor | None = None
    ) -> tuple[tuple[ForgetObjective, ...], list[MicroBatches]]:
        """Return the forget objectives, and the micro-batches of each of them and, last, of the retain objective.

        missing: how far each request has to go, from the adaptive budget; without it all have their turn.
        """
        training = self.training
        chosen = forget_step(training, self.mode, self.forget.request, step, missing)
        rows = pick(training.seed, "retain", step, len(self.retain.x_0), training.retain_batch)
        forget = [
            self._micro(step, "forget", chosen.rows, one.samples, lambda draw: self.losses.forget(self.forget, draw))
            for one in chosen.objectives
        ]
        everything = torch.arange(training.retain_batch)
        retain = self._micro(step, "retain", rows, everything, lambda draw: self.losses.retain(self.retain, draw))
        return chosen.objectives, [*forget, retain]

    def _micro(
        self, step: int, stream: Stream, rows: Tensor, samples: Tensor, loss: Callable[[Draw], Tensor]
    ) -> MicroBatches:
        def one(part: Tensor, scale: float) -> Callable[[], Tensor]:
            return lambda: scale * loss(draw_samples(self.losses.model, self.training, stream, step, rows, part))

        return [one(part, scale) for part, scale in micro_batches(self.training, samples, self.rank, self.world)]
