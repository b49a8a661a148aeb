"""Work items through one denoiser: as many at once as memory allows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.families.base import Conditioning, DiffusionModel, moved, rows
from expunge.families.sampler import denoise
from expunge.logs import get_logger

MOST = 64
"""Samples per pass where they are small; more are no faster."""
POSITIONS = {"cpu": 2**18, "cuda": 2**20}
"""Positions of latents (height times width) per pass; on a GPU it is a first guess, halved until it fits."""


@dataclass(frozen=True)
class Items:
    """N samples that go the same way: from one noise level down to clean in equally many steps."""

    prompts: Tensor
    """int64 [N]: rows of the conditioning."""
    noise: Callable[[Tensor], Tensor]
    """Draws float32 [n, C, H, W] on the host for the items at `index`, int64 [n]."""
    steps: int
    level: float = 1.0
    start: Tensor | None = None
    """float32 [N, C, H, W]: the clean latents that are noised up to `level`; None: pure noise."""

    def __len__(self) -> int:
        return len(self.prompts)


class Sampler:
    """Denoises items with a model and the table of its prompts."""

    def __init__(
        self,
        model: DiffusionModel,
        conditioning: Conditioning,
        empty: Conditioning,
        *,
        guidance: float,
        most: int = MOST,
    ) -> None:
        """Take what stays on the host until it is needed. empty: the row of the empty prompt. most: items per pass."""
        self._model, self._conditioning, self._empty, self._guidance = model, conditioning, empty, guidance
        _, height, width = model.latent_shape
        positions = POSITIONS[torch.device(model.device).type]
        self.batch = max(1, min(most, positions // (height * width)))
        """Items per pass. It changes how a result is rounded, and nothing else."""

    def __call__(self, items: Items) -> Tensor:
        """Return the clean latents, float32 [N, C, H, W] on the host. Raises OutOfMemoryError if one does not fit."""
        done: list[Tensor] = []
        first = 0
        while first < len(items):
            index = torch.arange(first, min(first + self.batch, len(items)))
            try:
                done.append(self._pass(items, index).cpu())
                first += len(index)
                continue
            except torch.OutOfMemoryError:
                if self.batch == 1:
                    raise
            # Not in the handler: as long as it runs, the error's traceback keeps the tensors of the pass in memory.
            self.batch //= 2
            torch.cuda.empty_cache()
            get_logger("generation").info("the GPU is too small for this batch", batch=self.batch)
        return torch.cat(done)

    def _pass(self, items: Items, index: Tensor) -> Tensor:
        model, device = self._model, self._model.device
        x_t = items.noise(index)
        if items.start is not None:
            point = model.at(model.time_at(torch.tensor([items.level])))
            x_t = point.noised(items.start[index], x_t)
        conditioning = rows(self._conditioning, items.prompts[index])
        blank = rows(self._empty, torch.zeros(len(index), dtype=torch.long))
        return denoise(
            model,
            x_t.to(device),
            items.level,
            moved(conditioning, device),
            steps=items.steps,
            guidance=self._guidance,
            empty=moved(blank, device),
        )
