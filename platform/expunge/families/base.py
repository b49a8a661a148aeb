"""What the rest of the platform asks of a diffusion model. Shapes: B batch, C H W latent, h w picture."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from expunge.families.path import PathPoint

Conditioning = dict[str, Tensor]
"""Named tensors with one row a prompt (none for an unconditional model)."""


def rows(conditioning: Conditioning, index: Tensor) -> Conditioning:
    """The conditioning of a batch: row `index[i]` for sample i."""
    return {name: table[index] for name, table in conditioning.items()}


class DiffusionModel(ABC):
    """A base model at one resolution. `network` is what gets trained; everything else is frozen."""

    network: nn.Module
    latent_shape: tuple[int, int, int]
    component: str
    """The pipeline component that `network` is, and the folder its weights are saved in."""
    noise_of_clipped: bool = True
    """Whether sampling goes on with the noise that belongs to the clipped estimate, or with the predicted one."""
    lora_targets: tuple[str, ...] = ()
    """Linear layers that a LoRA adapter attaches to; empty where full weights are trained."""

    @abstractmethod
    def encode(self, pictures: Tensor) -> Tensor:
        """float32 [B, 3, h, w] in [-1, 1] to latents [B, C, H, W] in the space the network works in."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] to float32 [B, 3, h, w] in [-1, 1]."""

    @abstractmethod
    def condition(self, prompts: Sequence[str]) -> Conditioning:
        """One row a prompt."""

    @abstractmethod
    def at(self, time: Tensor) -> PathPoint:
        """The path at `time` [B], in the network's own unit of time."""

    @abstractmethod
    def time_at(self, level: Tensor) -> Tensor:
        """The time [B] whose noise level b / (a + b) is nearest to `level` [B] in (0, 1)."""

    @abstractmethod
    def time_from_uniform(self, u: Tensor) -> Tensor:
        """The time [B] at quantile `u` [B] in [0, 1) of the family's uniform distribution over times."""

    @abstractmethod
    def predict(self, x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's output [B, C, H, W] at x_t."""

    @abstractmethod
    def save_adapter(self, folder: Path) -> None:
        """Write the LoRA adapter on `network` in diffusers' format."""

    @torch.no_grad()
    def denoise(
        self, x_t: Tensor, start: float, conditioning: Conditioning, *, steps: int, guidance: float, empty: Conditioning
    ) -> Tensor:
        """Deterministic sampling (DDIM for DDPM, Euler for a flow) from noise level `start` down to a clean latent.

        Both are one rule here: estimate (x_0, eps) at x_t and move along the path to the next, lower level.
        """
        x = x_t
        guided = _unlike(conditioning, empty) if guidance > 1 and empty else x_t.new_zeros(0, dtype=torch.long)
        # With and without the prompt in one batch: small ones cost more a sample.
        asked = torch.cat([torch.arange(len(x), device=x.device), guided])
        conditions = conditioning
        if len(guided):
            conditions = {name: torch.cat([table, empty[name][guided]]) for name, table in conditioning.items()}
        for here, nxt in self._path_down(start, steps):
            now = self.at(here.expand(len(x)))
            both = self.predict(x[asked], here.expand(len(asked)), conditions)
            prediction, unguided = both[: len(x)], both[len(x) :]
            prediction[guided] = unguided + guidance * (prediction[guided] - unguided)
            estimate = now.clean(x, prediction)
            clean = self.clip(estimate)
            if nxt is None:
                return clean
            a, b = (v.view(-1, 1, 1, 1) for v in (now.a, now.b))
            noise = (x - a * (clean if self.noise_of_clipped else estimate)) / b
            x = nxt.a.view(-1, 1, 1, 1) * clean + nxt.b.view(-1, 1, 1, 1) * noise
        return x

    def clip(self, clean: Tensor) -> Tensor:
        """Bound a clean estimate where the family's space is bounded."""
        return clean

    def _path_down(self, start: float, steps: int) -> list[tuple[Tensor, PathPoint | None]]:
        """The times [1] at which the network is asked, from noise level `start` down, each with where the path goes
        from there [1]; None is the clean estimate itself."""
        # Levels evenly spaced in time, as the samplers of both families do, not in noise level.
        times = self._descending(self.time_at(torch.tensor([start], dtype=torch.float32)), steps)
        return [*((here, self.at(there)) for here, there in pairwise(times)), (times[-1], None)]

    @abstractmethod
    def _descending(self, first: Tensor, steps: int) -> list[Tensor]:
        """`steps` times [1] from `first` down, evenly spaced, the last above clean."""

    def generate(
        self, noise: Tensor, conditioning: Conditioning, *, steps: int, guidance: float, empty: Conditioning
    ) -> Tensor:
        """Latents from pure noise [B, C, H, W]."""
        return self.denoise(noise, 1.0, conditioning, steps=steps, guidance=guidance, empty=empty)


def _unlike(conditioning: Conditioning, empty: Conditioning) -> Tensor:
    """int64 [G]: the samples that guidance moves: those whose conditioning is not the empty one already."""
    # Not bit by bit: a text encoder rounds a prompt differently in another batch.
    same = [torch.isclose(table, empty[name], 1e-4, 1e-4).flatten(1).all(1) for name, table in conditioning.items()]
    return torch.nonzero(~torch.stack(same).all(0)).flatten()
