"""The model under removal as an editor's tool: it repaints a picture, or a part of it, and needs no other weights.

Imports torch in the method that needs it, not above: an edit is checked at a submit, which must not wait for that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from expunge.families.base import Conditioning, DiffusionModel, moved, steps_from

if TYPE_CHECKING:
    from torch import Tensor

    from expunge.families.path import PathPoint


@dataclass(frozen=True)
class Painter:
    """A model, and how it is sampled."""

    model: DiffusionModel
    prompt: str
    """What is painted where nothing else is asked for: a general prompt, which names no target."""
    guidance: float
    steps: int
    """Steps from pure noise; fewer from a lower level."""
    rows: dict[str, Conditioning] = field(default_factory=dict)
    """Prompts that are encoded already, each to a table of one row; others are encoded when they are asked for."""

    def repaint(
        self, picture: np.ndarray, *, mask: np.ndarray | None, level: float, seed: int, prompt: str | None = None
    ) -> np.ndarray:
        """Noise uint8 [h, w, 3] to noise level `level` in (0, 1], and denoise it again (SDEdit, Meng et al. 2022).

        mask: bool [h, w], the part that is repainted; around it, the picture is noised anew to every level on the way
        down (RePaint, Lugmayr et al. 2022) and stays as it is in the end. None repaints everything.
        """
        import torch
        from torch.nn.functional import adaptive_max_pool2d

        from expunge.families.sampler import denoise
        from expunge.generation.noise import seeded_noise
        from expunge.pixels import to_pictures, to_tensor

        model, device, (height, width) = self.model, self.model.device, picture.shape[:2]
        x_f = model.encode(to_tensor(picture[None])).to(device)
        noise = seeded_noise([seed], x_f.shape[1:]).to(device)
        free = torch.ones(1, 1, height, width) if mask is None else torch.from_numpy(mask)[None, None].float()
        # A latent pixel is free if any of its pixels is.
        free = (adaptive_max_pool2d(free, x_f.shape[-2:]) > 0).to(device)

        def keep_around(x: Tensor, there: PathPoint) -> Tensor:
            return torch.where(free, x, there.noised(x_f, noise))

        clean = denoise(
            model,
            model.at(model.time_at(torch.tensor([level]))).to(device).noised(x_f, noise),
            level,
            self._condition(self.prompt if prompt is None else prompt),
            steps=steps_from(level, self.steps),
            guidance=self.guidance,
            empty=self._condition(""),
            between=keep_around,
        )
        painted = to_pictures(model.decode(clean.cpu()))[0]
        return painted if mask is None else np.where(mask[..., None], painted, picture)

    def _condition(self, prompt: str) -> Conditioning:
        """Encode a prompt once, and bring it to the model's device."""
        if prompt not in self.rows:
            self.rows[prompt] = self.model.condition([prompt])
        return moved(self.rows[prompt], self.model.device)
