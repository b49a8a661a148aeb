"""Judge surrogates as the evaluation sees pictures: it lies above the preparation, and so is handed down to it."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from expunge.evaluation.calibration import Calibration, find_calibration
from expunge.evaluation.plausibility import LEAST, Domain
from expunge.evaluation.space import Features, Space
from expunge.evaluation.views import all_views
from expunge.pixels import to_tensor
from expunge.preparation.prepare import prepare
from expunge.requests.blobs import BlobStore
from expunge.runs.job import JobFolder
from expunge.settings import Settings
from expunge.surrogates import Verdict
from expunge.types import PreparedJob, UnlearnJob

UNRELATED = 0.95
"""A surrogate may be as like its target as this share of the base model's unrelated samples are."""
FEWEST = 20
"""Samples, below which that share means nothing."""


def prepare_judged(folder: JobFolder, settings: Settings, blobs: BlobStore) -> PreparedJob:
    """Prepare a job, and make surrogates again that the evaluation would take for their target, or for no picture."""
    return prepare(folder, settings, blobs, partial(sample_judging, settings))


def sample_judging(settings: Settings, job: UnlearnJob, samples: np.ndarray) -> "SampleJudging":
    """Make what judges a job's surrogates, from samples of its base model, uint8 [N, h, w, 3]."""
    return SampleJudging.of(settings, job.model, samples, job.base)


@dataclass(frozen=True)
class SampleJudging:
    """Compares surrogates with samples of the base model, in the encoders that the verdict uses.

    The match thresholds alone do not do: of a model whose pictures resemble one another, such as flags, they call
    hardly any two pictures the same.
    """

    space: Space
    samples: Features
    domain: Domain | None
    """None where there are too few samples to say what is plausible."""
    calibration: Calibration | None

    @classmethod
    def of(cls, settings: Settings, model: str, samples: np.ndarray, base: str | None = None) -> "SampleJudging":
        """Take a model's samples, uint8 [N, h, w, 3]. base: digest of its files, where it is known already."""
        pictures = to_tensor(samples)
        space, features = Space.around(settings.evaluation.encoders, pictures)
        calibration = find_calibration(settings, model, base=base)
        domain = Domain.of(space, pictures, calibration, features=features) if len(pictures) >= LEAST else None
        return cls(space, features, domain, calibration)

    def against(self, targets: np.ndarray) -> "SampleJudge":
        """Return a judge for the surrogates of one request's pictures, uint8 [T, h, w, 3]."""
        views = self.space.features(torch.cat([all_views(target) for target in to_tensor(targets)]))
        return SampleJudge(self, views, self._limits(views))

    def _limits(self, views: Features) -> Tensor:
        """Return the similarity to the nearest view from which on a surrogate is still the target, float64 [E]."""
        limits = torch.full((len(self.space.encoders),), torch.inf, dtype=torch.float64)
        if len(self.samples[0]) >= FEWEST:
            limits = torch.quantile(self.space.similarity(self.samples, views), UNRELATED, dim=0)
        if self.calibration is not None:
            limits = torch.minimum(limits, self.calibration.limits(self.space.names))
        return limits


@dataclass(frozen=True)
class SampleJudge:
    """Judges the surrogates of one request."""

    judging: SampleJudging
    views: Features
    limits: Tensor

    def __call__(self, surrogate: np.ndarray) -> Verdict:
        """Judge uint8 [h, w, 3]."""
        judging, picture = self.judging, to_tensor(surrogate[None])
        features = judging.space.features(picture)
        similarity = judging.space.similarity(features, self.views)[0]
        domain, calibration = judging.domain, judging.calibration
        return Verdict(
            likeness=(similarity - self.limits).max().item(),
            plausible=domain is None or not bool(domain.implausible(picture, features)),
            matches=calibration is not None and bool((similarity >= calibration.limits(judging.space.names)).all()),
        )
