"""`edges`, the encoder that does not see colour: the same shape in another colour is still the same picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from expunge.evaluation.encoders.base import Encoder, in_chunks, refuse_reference

if TYPE_CHECKING:
    from torch import Tensor


class Edges(Encoder):
    """Histograms of oriented gradients (Dalal and Triggs 2005) of the picture at 64 x 64 px, D = 2916.

    Directions are unsigned, each pixel counts the colour channel with the steepest gradient, and every block of cells
    is normalised. So a change of contrast leaves the features as they are, and so does exchanging or inverting colour
    channels, which a grey picture would not survive: red and green that are equally bright have no edge there.
    """

    usage = name = "edges"
    size = (64, 64)
    cell, block, directions = 8, 3, 9
    """Pixels per side of a cell, cells per side of a block, and directions per cell."""

    def __init__(self, reference: str = "") -> None:
        self.find(reference)

    @classmethod
    def check(cls, reference: str) -> None:
        refuse_reference(cls.name, reference)

    @classmethod
    def find(cls, reference: str) -> str:
        return "scikit-image"

    def __call__(self, images: Tensor) -> Tensor:
        return in_chunks(images, self.size, self._features)

    def _features(self, images: Tensor) -> Tensor:
        import numpy as np
        import torch
        from skimage.feature import hog

        rows = [
            hog(
                image.numpy(),
                orientations=self.directions,
                pixels_per_cell=(self.cell, self.cell),
                cells_per_block=(self.block, self.block),
                block_norm="L2-Hys",
                channel_axis=0,
            )
            for image in images
        ]
        return torch.from_numpy(np.stack(rows))
