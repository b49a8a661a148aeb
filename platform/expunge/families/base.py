"""What the rest of the platform asks of a diffusion model. Shapes: B batch, C H W latent, h w picture."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from diffusers import DiffusionPipeline
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
        # Levels evenly spaced in time, as the samplers of both families do, not in noise level.
        first = self.time_at(torch.tensor([start], dtype=torch.float32))
        times = self._descending(first, steps)
        x = x_t
        guided = _unlike(conditioning, empty) if guidance > 1 and empty else x_t.new_zeros(0, dtype=torch.long)
        # With and without the prompt in one batch: small ones cost more a sample.
        asked = torch.cat([torch.arange(len(x), device=x.device), guided])
        conditions = conditioning
        if len(guided):
            conditions = {name: torch.cat([table, empty[name][guided]]) for name, table in conditioning.items()}
        for here, there in zip(times, [*times[1:], None], strict=True):
            now = self.at(here.expand(len(x)))
            both = self.predict(x[asked], here.expand(len(asked)), conditions)
            prediction, unguided = both[: len(x)], both[len(x) :]
            prediction[guided] = unguided + guidance * (prediction[guided] - unguided)
            clean = self.clip(now.clean(x, prediction))
            if there is None:
                return clean
            nxt = self.at(there.expand(len(x)))
            a, b = (v.view(-1, 1, 1, 1) for v in (now.a, now.b))
            noise = (x - a * clean) / b
            x = nxt.a.view(-1, 1, 1, 1) * clean + nxt.b.view(-1, 1, 1, 1) * noise
        return x

    def clip(self, clean: Tensor) -> Tensor:
        """Bound a clean estimate where the family's space is bounded."""
        return clean

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


def load_pipeline(source: str) -> DiffusionPipeline:
    """A pipeline in float32. A component saved as absent (SD3 without its T5) stays so: diffusers must be told."""
    parts = cast(dict[str, object], DiffusionPipeline.load_config(source))
    absent = {name: None for name, part in parts.items() if isinstance(part, list) and part[0] is None}
    return DiffusionPipeline.from_pretrained(source, dtype=torch.float32, **absent)
