"""Several encoders side by side, each with its own centre: similarity is never one encoder's word alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.evaluation.encoders import Encoder, load_encoder
from expunge.evaluation.metrics import centred_cosine

Features = tuple[Tensor, ...]
"""One float32 [N, D_e] for each encoder e."""


@dataclass(frozen=True)
class Space:
    """E encoders, and the mean feature of the base model's unrelated samples in each."""

    encoders: tuple[Encoder, ...]
    centre: Features
    """float32 [D_e] for each encoder."""

    @classmethod
    def around(cls, names: Sequence[str], pictures: Tensor) -> tuple["Space", Features]:
        """Load the encoders that `names` name, centred on `pictures` [N, 3, h, w]; return their features, too."""
        encoders = tuple(load_encoder(name) for name in names)
        features = tuple(encoder(pictures) for encoder in encoders)
        return cls(encoders, tuple(z.mean(0) for z in features)), features

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(encoder.name for encoder in self.encoders)

    def features(self, pictures: Tensor) -> Features:
        """Encode pictures [N, 3, h, w] in [-1, 1]."""
        return tuple(encoder(pictures) for encoder in self.encoders)

    def similarity(self, outputs: Features, references: Features) -> Tensor:
        """Return each output's similarity to the nearest of M references, float64 [N, E].

        The references are the views of one picture: an output that shows it mirrored or moved still shows it.
        """
        return torch.stack([table.amax(1) for table in self.table(outputs, references)], dim=1)

    def table(self, outputs: Features, references: Features) -> tuple[Tensor, ...]:
        """Return the centred cosine of every output with every reference, float64 [N, M] for each encoder."""
        return tuple(
            torch.stack([centred_cosine(mine, one, centre) for one in theirs], dim=1)
            for mine, theirs, centre in zip(outputs, references, self.centre, strict=True)
        )
