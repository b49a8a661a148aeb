"""What every arm learns from: one model, and the same targets, surrogates, retain images, noise and batch sizes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor, nn

from expunge.families.base import Conditioning, DiffusionModel, rows
from expunge.families.path import PathPoint
from expunge.preparation.dataset import ForgetSet, RetainSet
from expunge.settings import TrainingSettings
from expunge.unlearning.losses import Frozen
from expunge.unlearning.objectives import Mode
from expunge.unlearning.sampling import draw_samples, pick

Gradient = list[Tensor]
"""One tensor for each trained weight."""


@dataclass(frozen=True)
class Lesson:
    """One training's model and data."""

    model: DiffusionModel
    frozen: Frozen
    training: TrainingSettings
    forget: ForgetSet
    retain: RetainSet
    conditioning: Conditioning
    empty: Conditioning
    """The row of the empty prompt."""
    mode: Mode
    """Whether the product has a gradient per request."""
    device: torch.device | str = "cpu"

    @cached_property
    def weights(self) -> list[nn.Parameter]:
        """The weights that are trained."""
        return [weight for weight in self.model.network.parameters() if weight.requires_grad]

    @property
    def both(self) -> int:
        """The samples of a step that have one kind only: as many as the product takes of both kinds."""
        return self.training.forget_batch + self.training.retain_batch

    def targets(self, step: int, count: int, kept: Tensor | None = None) -> "Batch":
        """Draw `count` noised targets. kept: int64 [k], the only rows of the forget set to draw from."""
        data = self.forget
        kept = torch.arange(len(data.x_f)) if kept is None else kept
        row = kept[pick(self.training.seed, "forget", step, len(kept), count)]
        return self._batch("forget", step, row, data.x_f, data.prompt)

    def surrogates(self, step: int, count: int) -> "Batch":
        """Draw `count` noised surrogates."""
        data = self.forget
        row = pick(self.training.seed, "forget", step, len(data.x_s), count)
        return self._batch("forget", step, row, data.x_s, data.prompt)

    def others(self, step: int, count: int) -> "Batch":
        """Draw `count` noised retain images."""
        data = self.retain
        row = pick(self.training.seed, "retain", step, len(data.x_0), count)
        return self._batch("retain", step, row, data.x_0, data.prompt)

    def gradient(self, loss: Tensor, *, again: bool = False) -> Gradient:
        """Return the gradient of a scalar loss. again: another one will be taken through the same forward pass."""
        return list(torch.autograd.grad(loss, self.weights, retain_graph=again))

    def _batch(self, stream: str, step: int, row: Tensor, pictures: Tensor, prompt: Tensor) -> "Batch":
        assert stream in ("forget", "retain")
        # The controls are published with uniform times; so is the stream `retain`, whatever the density.
        method = self.training.model_copy(update={"density": "uniform"})
        draw = draw_samples(self.model, method, stream, step, row, torch.arange(len(row)))
        return Batch(
            self.model,
            pictures[row].to(self.device),
            self.model.at(draw.time).to(self.device),
            draw.time.to(self.device),
            draw.noise.to(self.device),
            {name: table.to(self.device) for name, table in rows(self.conditioning, prompt[row]).items()},
        )


@dataclass(frozen=True)
class Batch:
    """B pictures on the model's path, with x_t = a x_0 + b eps, of which the network predicts alpha eps + beta x_0."""

    model: DiffusionModel
    x_0: Tensor
    """float32 [B, C, H, W]."""
    point: PathPoint
    time: Tensor
    """[B]."""
    noise: Tensor
    """float32 [B, C, H, W]."""
    conditioning: Conditioning

    @cached_property
    def x_t(self) -> Tensor:
        return self.point.noised(self.x_0, self.noise)

    @property
    def target(self) -> Tensor:
        """What the network is trained to predict of an ordinary picture, [B, C, H, W]."""
        return self.with_noise(self.noise)

    def with_noise(self, noise: Tensor) -> Tensor:
        """Return what it would have to predict if `noise` [B, C, H, W] were in x_t."""
        return over(self.point.alpha) * noise + over(self.point.beta) * self.x_0

    def predict(self, conditioning: Conditioning | None = None) -> Tensor:
        """Ask the network, under another conditioning if given."""
        return self.model.predict(self.x_t, self.time, self.conditioning if conditioning is None else conditioning)

    def loss(self, target: Tensor | None = None) -> Tensor:
        """Return the scalar mean squared error to `target`, by default the ordinary one."""
        return squared(self.predict() - (self.target if target is None else target)).mean()

    def replaced(self, x_0: Tensor) -> Self:
        """Return the same path, noise and conditioning with other pictures."""
        return type(self)(self.model, x_0, self.point, self.time, self.noise, self.conditioning)


def over(values: Tensor) -> Tensor:
    """Shape values [B] to multiply pictures [B, C, H, W]."""
    return values.view(-1, 1, 1, 1)


def squared(error: Tensor) -> Tensor:
    """Return the mean square of each sample's error, [B]."""
    return error.square().flatten(1).mean(1)


def combine(first: Gradient, second: Gradient, weight: float) -> Gradient:
    """Return first + weight * second."""
    return [a + weight * b for a, b in zip(first, second, strict=True)]


def dot(first: Gradient, second: Gradient) -> float:
    """Return the inner product of two gradients."""
    return sum(torch.dot(a.flatten(), b.flatten()).item() for a, b in zip(first, second, strict=True))


Method = Callable[[Lesson, int], Gradient]
"""Returns the gradient of a step, before the clip."""
