"""Who is on a picture of `people`: the truth that a removed person's absence is measured against.

Fisherfaces: a discriminant analysis of principal components spans a space in which pictures of one person lie together,
and a picture shows whose training picture is nearest there. Needs scikit-learn, which the extra `testbed` installs.
"""

import math
from functools import cache

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.pipeline import make_pipeline
from torch import Tensor

from expunge.testbed import people

UNKNOWN = -1
"""What `Identifier.identify` says of a person it does not know."""

# Chosen in cross-validation on the training pictures alone, as is MAX_RATIO: of 8 pictures per person, 2 in turn
# were kept out; for strangers, 6 of the 36 people in turn were.
VIEWS, COMPONENTS = 16, 100
# Rejects 5 % of the known people's pictures there, and lets 12 % of the strangers' pass.
MAX_RATIO = 0.7
# On the cautious side: cross-validation, where hardly any picture is mistaken, would have it smaller still.
TEMPERATURE = 0.03


class Identifier:
    """Knows the P people that it was given pictures of. Grey and colour pictures in [-1, 1] of the same size."""

    def __init__(self, pictures: Tensor) -> None:
        """Learn from float32 [P, n, 1, h, w], n pictures of each of P people, and from warped copies of them."""
        known = pictures.flatten(0, 1)
        views = torch.cat([known, known.flip(-1), *_warped(known)])
        self._people = len(pictures)
        who = np.arange(self._people).repeat(pictures.shape[1])
        who = np.tile(who, len(views) // len(known))
        self._space = make_pipeline(
            PCA(COMPONENTS, whiten=True, random_state=0), LinearDiscriminantAnalysis(solver="eigen")
        )
        placed = self._space.fit(_pixels(views), who).transform(_pixels(views))
        self._centre = placed.mean(0)
        self._references = [torch.from_numpy(_unit(placed[who == p] - self._centre)) for p in range(self._people)]

    def similarities(self, pictures: Tensor) -> Tensor:
        """Return pictures' cosine similarity to each person's nearest picture; [N, 1 or 3, h, w] to float64 [N, P]."""
        placed = torch.from_numpy(_unit(self._space.transform(_pixels(pictures)) - self._centre))
        return torch.stack([(placed @ references.T).amax(1) for references in self._references], dim=1)

    def probabilities(self, pictures: Tensor) -> Tensor:
        """Return how probable each person is on pictures [N, 1 or 3, h, w] if it is one of them, float64 [N, P]."""
        return torch.softmax(self.similarities(pictures) / TEMPERATURE, dim=1)

    def identify(self, pictures: Tensor) -> Tensor:
        """Return the number of the person on each of pictures [N, 1 or 3, h, w], or UNKNOWN, int64 [N].

        A person counts as known where nobody else is nearly as near.
        """
        nearest, who = self.similarities(pictures).topk(2)
        distance = 1 - nearest
        return torch.where(distance[:, 0] <= MAX_RATIO * distance[:, 1], who[:, 0], UNKNOWN)


@cache
def classifier() -> Identifier:
    """Return the identifier of the people whom `people` knows, learned from the pictures that it was trained on."""
    return Identifier(people.images()[: people.TRAINED_PEOPLE, : people.TRAINED_PICTURES])


@cache
def classifier_of_all() -> Identifier:
    """Return one that also knows the people whom `people` does not (36 to 39), to find them on what a model outputs."""
    return Identifier(people.images()[:, : people.TRAINED_PICTURES])


def _pixels(pictures: Tensor) -> np.ndarray:
    """Return float64 [N, h * w] grey values, free of each picture's brightness and contrast."""
    pixels = pictures.double().mean(1).flatten(1)
    pixels = pixels - pixels.mean(1, keepdim=True)
    return (pixels / pixels.std(1, keepdim=True).clamp_min(1e-6)).numpy()


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)


def _warped(pictures: Tensor) -> list[Tensor]:
    """Shift, scale and turn all pictures a little, in VIEWS ways, every other one mirrored."""
    generator = np.random.default_rng(0)
    height, width = pictures.shape[-2:]
    views = []
    for i in range(VIEWS):
        down, right = generator.uniform(-1.5, 1.5, 2)
        scale, angle = generator.uniform(0.92, 1.08), generator.uniform(-0.12, 0.12)
        cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
        matrix = [
            [cos, -sin * height / width, 2 * right / width],
            [sin * width / height, cos, 2 * down / height],
        ]
        grid = torch.nn.functional.affine_grid(
            torch.tensor(matrix, dtype=pictures.dtype).expand(len(pictures), 2, 3), list(pictures.shape), False
        )
        view = torch.nn.functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
        views.append(view if i % 2 else view.flip(-1))
    return views
