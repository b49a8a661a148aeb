"""SD3-medium at its real size with random weights in bfloat16; in a rehearsal, the same with almost no width."""

import math

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor

from expunge.families.architectures import Architecture
from expunge.families.base import Conditioning, DiffusionModel
from expunge.families.sd3 import SD3

NAME = "sd3-medium"
TINY = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "caption_projection_dim": 16,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
}
TOKENS = 77 + 256
DTYPE = torch.bfloat16


class Bare(SD3):
    """The transformer alone, built on its device: no text encoder, no autoencoder, no files."""

    def __init__(self, side: int, device: str, *, tiny: bool) -> None:
        """side: of the square pictures, in pixels."""
        self.device, self._unit = torch.device(device), 1000
        self.latent_shape = (16, side // 8, side // 8)
        self._patches = math.prod(self.latent_shape[1:]) // 4
        self._scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        torch.manual_seed(0)
        with torch.device(device):
            before = torch.get_default_dtype()
            torch.set_default_dtype(DTYPE)
            try:
                network = transformer(tiny)
            finally:
                torch.set_default_dtype(before)
        self._network = network.eval().requires_grad_(False)
        self._joint, self._pooled = (
            int(network.config[name]) for name in ("joint_attention_dim", "pooled_projection_dim")
        )

    def prompts(self, count: int) -> Conditioning:
        """Draw the conditioning of `count` prompts on the host, where a night keeps it."""
        generator = torch.Generator().manual_seed(count)
        hidden = torch.randn(count, TOKENS, self._joint, generator=generator)
        return {
            "encoder_hidden_states": hidden,
            "pooled_projections": torch.randn(count, self._pooled, generator=generator),
        }

    def latents(self, count: int, seed: int) -> Tensor:
        return torch.randn(count, *self.latent_shape, generator=torch.Generator().manual_seed(seed))


def transformer(tiny: bool) -> SD3Transformer2DModel:
    network = SD3Transformer2DModel.from_config({**SD3.published[NAME], **(TINY if tiny else {})})
    assert isinstance(network, SD3Transformer2DModel)
    return network


def architecture(side: int, *, tiny: bool) -> Architecture:
    """Describe the same network for the memory plan and the counting of operations, which build it without weights."""
    network = transformer(tiny)
    inputs = {
        "hidden_states": (16, side // 8, side // 8),
        "encoder_hidden_states": (TOKENS, int(network.config["joint_attention_dim"])),
        "pooled_projections": (int(network.config["pooled_projection_dim"]),),
        "timestep": (),
    }
    return Architecture(SD3, network, tuple(network.transformer_blocks), inputs)


def synchronise(model: DiffusionModel) -> None:
    """Wait for a GPU: it runs behind the host, and a time would else be that of the launches."""
    if torch.device(model.device).type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(device: str) -> int | None:
    """Return the most that torch's allocator has held since it was last reset; a CPU has no such count."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else None


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
