"""The two losses of a step: point the model at the surrogate from the target, and leave the rest where it is."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.families.base import Conditioning, DiffusionModel, rows
from expunge.families.path import PathPoint
from expunge.preparation.dataset import ForgetSet, RetainSet
from expunge.preparation.retain import centred
from expunge.settings import MethodSettings
from expunge.unlearning.sampling import Draw
from expunge.unlearning.weighting import WEIGHTINGS
from unlearn_kernels import noise_and_target, regression_loss, weighted_loss

Frozen = Callable[[], AbstractContextManager[object]]
"""A context in which `model.predict` answers as the base model does."""


@dataclass(frozen=True)
class Losses:
    """Computes both losses for samples that were drawn, and the progress of a request between target and surrogate."""

    model: DiffusionModel
    frozen: Frozen
    method: MethodSettings
    conditioning: Conditioning
    device: torch.device | str = "cpu"
    """The network's device. Sets, draws and the path's tables stay on the host; each micro-batch's part is moved."""

    def forget(self, data: ForgetSet, draw: Draw) -> Tensor:
        """Return the scalar forget loss: x_t is noised from the TARGET, and the regression points to the SURROGATE."""
        x_f, x_s = data.x_f[draw.rows].to(self.device), data.x_s[draw.rows].to(self.device)
        point, time, noise, cond = self._at(draw, data.prompt)
        x_t, _ = noise_and_target(x_f, x_s, noise, point.scales, point.coefficients, with_target=False)
        endpoint = x_s
        if self.method.forget_target == "recognition":
            endpoint = self._recognised(x_t, x_f, x_s, point, time, cond)
        prediction = self.model.predict(x_t, time, cond)
        weight = WEIGHTINGS[self.method.weighting](point, self.method)
        return weighted_loss(prediction, noise, x_f, endpoint, point.coefficients, weight)

    def retain(self, data: RetainSet, draw: Draw) -> Tensor:
        """Return the scalar retain loss: the ordinary one, or the distance to the frozen model's prediction at x_t."""
        x_0 = data.x_0[draw.rows].to(self.device)
        point, time, noise, cond = self._at(draw, data.prompt)
        x_t, _ = noise_and_target(x_0, x_0, noise, point.scales, point.coefficients, with_target=False)
        weight = torch.ones_like(point.a)
        if self.method.retain_target == "data":
            prediction = self.model.predict(x_t, time, cond)
            return weighted_loss(prediction, noise, x_0, x_0, point.coefficients, weight)
        # Before the student's forward: switching adapters off and on must not touch its graph.
        with torch.no_grad(), self.frozen():
            teacher = self.model.predict(x_t, time, cond)
        prediction = self.model.predict(x_t, time, cond)
        # The teacher's prediction is the target: the same loss with one term.
        return regression_loss(prediction, [teacher], torch.ones(len(x_0), 1), weight)

    @torch.no_grad()
    def progress(self, data: ForgetSet, draw: Draw) -> Tensor:
        """Locate the clean estimate from a noised target, float64 [b]: 0 at the target and 1 at the surrogate.

        <x_hat - x_f, x_s - x_f> / |x_s - x_f|^2, so whatever target and surrogate have in common does not count. It
        compares latents, not features, and one estimate instead of a whole denoising: it is no verdict.
        """
        x_f, x_s = data.x_f[draw.rows].to(self.device), data.x_s[draw.rows].to(self.device)
        point, time, noise, cond = self._at(draw, data.prompt)
        x_t, _ = noise_and_target(x_f, x_s, noise, point.scales, point.coefficients, with_target=False)
        gone, way = ((x - x_f).flatten(1).double() for x in (self._estimate(x_t, point, time, cond), x_s))
        return ((gone * way).sum(1) / way.square().sum(1)).cpu()

    @torch.no_grad()
    def _recognised(
        self, x_t: Tensor, x_f: Tensor, x_s: Tensor, point: PathPoint, time: Tensor, cond: Conditioning
    ) -> Tensor:
        """Move the frozen model's clean estimate towards the surrogate as far as it recognises the target in x_t.

        y = x_hat + cos^2(x_hat, x_f) (x_s - x_f), both centred: where the model does not see the target, nothing moves.
        """
        with self.frozen():
            estimate = self._estimate(x_t, point, time, cond)
        alpha = torch.cosine_similarity(centred(estimate), centred(x_f), dim=1) ** 2
        return estimate + alpha.view(-1, 1, 1, 1) * (x_s - x_f)

    def _estimate(self, x_t: Tensor, point: PathPoint, time: Tensor, cond: Conditioning) -> Tensor:
        """Estimate the clean image that the model sees in x_t."""
        return self.model.clip(point.clean(x_t, self.model.predict(x_t, time, cond)))

    def _at(self, draw: Draw, prompt: Tensor) -> tuple[PathPoint, Tensor, Tensor, Conditioning]:
        """Return the path, time, noise and conditioning of a draw, on the network's device."""
        point = self.model.at(draw.time)
        parts = (part.to(self.device) for part in (point.a, point.b, point.alpha, point.beta))
        cond = {name: part.to(self.device) for name, part in rows(self.conditioning, prompt[draw.rows]).items()}
        return PathPoint(*parts), draw.time.to(self.device), draw.noise.to(self.device), cond
