"""What one worker does at a step: micro-batches of its part of the samples, by objective."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.preparation.dataset import ForgetSet, RetainSet
from expunge.unlearning.objective import Objective
from expunge.unlearning.sampling import Draw, Stream, draw_samples, pick
from expunge.unlearning.tasks import Mode, Task, forget_step, micro_batches

MicroBatches = list[Callable[[], Tensor]]


@dataclass(frozen=True)
class Steps:
    """Called with a step, it gives the forget tasks and, for each of them and for the retain set, the micro-batches."""

    objective: Objective
    forget: ForgetSet
    retain: RetainSet
    mode: Mode
    rank: int
    world: int

    def __call__(self, step: int, missing: Tensor | None = None) -> tuple[tuple[Task, ...], list[MicroBatches]]:
        """missing: what the adaptive budget says that each request misses; without it all of them have their turn."""
        training = self.objective.training
        plan = forget_step(training, self.mode, self.forget.request, step, missing)
        rows = pick(training.seed, "retain", step, len(self.retain.x_0), training.retain_batch)
        forget = [
            self._micro(step, "forget", plan.rows, t.samples, lambda draw: self.objective.forget(self.forget, draw))
            for t in plan.tasks
        ]
        everything = torch.arange(training.retain_batch)
        retain = self._micro(step, "retain", rows, everything, lambda draw: self.objective.retain(self.retain, draw))
        return plan.tasks, [*forget, retain]

    def _micro(
        self, step: int, stream: Stream, rows: Tensor, samples: Tensor, loss: Callable[[Draw], Tensor]
    ) -> MicroBatches:
        training = self.objective.training

        def one(part: Tensor, scale: float) -> Callable[[], Tensor]:
            return lambda: scale * loss(draw_samples(self.objective.model, training, stream, step, rows, part))

        return [one(part, scale) for part, scale in micro_batches(training, samples, self.rank, self.world)]
