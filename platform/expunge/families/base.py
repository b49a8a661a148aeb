"""The protocol through which training and evaluation use a diffusion model.

Shapes: B batch, C H W latent, h w picture. Imports no torch, as `family` explains.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from expunge.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from expunge.families.path import PathPoint

Conditioning = dict[str, "Tensor"]
"""Named tensors with one row per prompt; empty for an unconditional model."""


def rows(conditioning: Conditioning, index: Tensor) -> Conditioning:
    """Pick the conditioning of a batch: row `index[i]` for sample i."""
    return {name: table[index] for name, table in conditioning.items()}


def moved(conditioning: Conditioning, device: torch.device | str) -> Conditioning:
    """Return a conditioning on a device."""
    return {name: table.to(device) for name, table in conditioning.items()}


def steps_from(level: float, steps: int) -> int:
    """Return the steps of sampling from noise level `level`, which takes `steps` from pure noise: two or more."""
    return max(2, round(level * steps))


class DiffusionModel(ABC):
    """A base model at one resolution. `network` is what gets trained; everything else is frozen.

    Pictures, latents and conditioning that a model returns are on the host.
    """

    device: torch.device | str = "cpu"
    """Where the networks are."""
    latent_shape: tuple[int, int, int]
    component: str
    """The pipeline component that `network` is, and the folder that its weights are saved in."""
    lora_targets: tuple[str, ...] = ()
    """Linear layers that a LoRA adapter attaches to; empty where full weights are trained."""
    noise_of_clipped: bool = True
    """Sampling goes on with the noise that belongs to the clipped estimate; if False, with the predicted noise."""

    _network: nn.Module | None = None

    @property
    def network(self) -> nn.Module:
        """The network that predicts; read from disk when it is first asked for."""
        if self._network is None:
            self._network = self._read_network()
        return self._network

    @network.setter
    def network(self, network: nn.Module) -> None:
        self._network = network

    def _read_network(self) -> nn.Module:
        raise NotImplementedError

    @abstractmethod
    def encode(self, pictures: Tensor) -> Tensor:
        """Map float32 [B, 3, h, w] in [-1, 1] to latents [B, C, H, W] in the space that the network works in."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Map latents [B, C, H, W] to float32 [B, 3, h, w] in [-1, 1]."""

    @abstractmethod
    def condition(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts, one row for each."""

    @abstractmethod
    def at(self, time: Tensor) -> PathPoint:
        """Return the path at `time` [B], in the network's own unit of time."""

    @abstractmethod
    def time_at(self, level: Tensor) -> Tensor:
        """Return the time [B] whose noise level b / (a + b) is nearest to `level` [B] in (0, 1)."""

    @abstractmethod
    def time_from_uniform(self, u: Tensor) -> Tensor:
        """Return the time [B] at quantile `u` [B] in [0, 1) of the family's uniform distribution over times."""

    @abstractmethod
    def predict(self, x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the network's output [B, C, H, W] at x_t, on the device and in the precision of x_t."""

    @abstractmethod
    def times_down(self, first: Tensor, steps: int) -> list[Tensor]:
        """Return `steps` times [1] from `first` [1] down, evenly spaced, the last above clean."""

    def path_down(self, level: Tensor, steps: int) -> list[tuple[Tensor, PathPoint | None]]:
        """Plan the sampling from noise level `level` [1] down.

        Returns the times [1] at which the network is asked, each with the point of the path [1] that the sample moves
        to from there; None stands for the clean estimate itself.
        """
        # Evenly spaced in time, as in diffusers' samplers, not in noise level.
        times = self.times_down(self.time_at(level), steps)
        return [*((here, self.at(there)) for here, there in pairwise(times)), (times[-1], None)]

    def clip(self, clean: Tensor) -> Tensor:
        """Bound a clean estimate where the family's space is bounded."""
        return clean

    def save_adapter(self, folder: Path) -> None:
        """Write the LoRA adapter on `network` in diffusers' format. Raises InputError where the family has none."""
        raise InputError("training.adapter: this family is trained in full", hint="set it to full or auto")
