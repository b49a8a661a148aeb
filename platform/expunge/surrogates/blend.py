"""`blend`: the marked part of another picture of the retain set, blended into the target.

It needs no model, but the donor must have a similar pose, as pictures of one training set mostly do. The defaults were
chosen by looking at two testbeds: a brightness-matched soft blend over most of the picture gives the face of another
person, while Poisson cloning (`mode=seamless`) keeps the target's own shading, and with it a good part of the likeness,
at 24 pixels. A donor that is aligned leaves no seam, but looks more like the target: hence `align` has to be asked for.
`python -m tests.benchmarks.surrogates` shows all of that.
"""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from pydantic import Field

from expunge.errors import InputError
from expunge.surrogates._alignment import align
from expunge.surrogates.base import Ellipse, Options, Share, Task, editor, region

SHORTLIST = 4
"""The seed picks one of this many best donors."""
MIN_CHANGE = 10.0
"""Root mean square, in grey levels, below which two pictures count as the same inside the mask."""
FEATHER = 0.15
"""Width of the soft edge, as a share of the mask's smaller side."""
RING = 5
"""Size in pixels of the kernel that grows the mask into its surroundings."""


class BlendOptions(Options):
    mode: Literal["soft", "seamless"] = Field("soft", description="soft or seamless")
    ellipse: Ellipse = Field((0.5, 0.52, 0.42, 0.46), description="cx/cy/rx/ry in [0, 1], used if there is no mask")
    strength: Share = Field(1.0, description="a number from 0 (the target) to 1 (the blend)")
    align: bool = Field(False, description="true or false: lay the donor over the target by landmarks or edges")
    match: bool = Field(True, description="true or false: fit the donor's brightness, contrast and hue to the target's")


@editor("blend", BlendOptions)
@dataclass(frozen=True)
class Blend:
    """Blends a donor into the target. Pixels outside the mask never change."""

    options: BlendOptions

    def __call__(self, task: Task) -> np.ndarray:
        target, mask = task.target, region(task.target, task.mask, self.options.ellipse)
        donor = self._donor(task, mask)
        result = _seamless(target, donor, mask) if self.options.mode == "seamless" else None
        if result is None:
            result = _soft(target, donor, mask)
        return _mix(target, result, self.options.strength * mask)

    def _donor(self, task: Task, mask: np.ndarray) -> np.ndarray:
        """Return the donor that fits best around the mask, among the half that differs most inside it.

        A good fit hides the seam. A large difference makes sure that the identity changes: the retain set may hold the
        same person or, being generated, the target itself.
        """
        target, donors = task.target, task.donors
        if donors.ndim != 4 or donors.shape[1:] != target.shape:
            raise InputError(f"edit: donors have shape {donors.shape}, the image {target.shape}")
        around = _surroundings(mask)
        inside, outside = [], []
        for donor in donors:
            fitted = self._fitted(donor, target, mask, around)
            inside.append(_difference(fitted, target, mask))
            outside.append(_difference(fitted, target, around))
        different = np.asarray(inside) >= max(MIN_CHANGE, float(np.median(inside)) if inside else 0.0)
        if not different.any():
            raise InputError(
                f"edit.editor: none of {len(donors)} retain pictures differs enough from the target to be blended in",
                hint="give surrogates, or a larger or more varied retain set",
            )
        ranked = np.argsort(np.where(different, outside, np.inf), kind="stable")
        shortlist = ranked[: min(SHORTLIST, int(different.sum()))]
        first = np.random.default_rng(task.seed).permutation(shortlist)
        order = [*first, *ranked[len(first) : int(different.sum())]]
        donor = donors[order[task.attempt % len(order)]]
        if self.options.align:
            donor = align(donor, target, mask | around)
        return self._fitted(donor, target, mask, around)

    def _fitted(self, donor: np.ndarray, target: np.ndarray, mask: np.ndarray, around: np.ndarray) -> np.ndarray:
        """Fit brightness and contrast in the mask and around it, and mean hue around it, where a seam would show."""
        if not self.options.match:
            return donor
        where = mask | around
        grey, wanted = donor[where].mean(1), target[where].mean(1)
        gain = np.clip(wanted.std() / max(grey.std(), 1e-3), 0.5, 2)
        fitted = (donor.astype(np.float32) - grey.mean()) * gain + wanted.mean()
        if around.any():
            shift = target[around].mean(0) - fitted[around].mean(0)
            fitted += shift - shift.mean()
        return _to_bytes(fitted)


def _seamless(target: np.ndarray, donor: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """Clone by Poisson blending; return None if that is impossible or changes next to nothing.

    It is impossible if fewer than 3x3 pixels are marked inside the picture's border. It changes next to nothing if the
    donor is flat, because it then only spreads the target's own boundary inwards.
    """
    inner = np.zeros(mask.shape, np.uint8)
    inner[1:-1, 1:-1] = mask[1:-1, 1:-1] * np.uint8(255)
    x, y, width, height = cv2.boundingRect(inner)
    if min(width, height) < 3:
        return None
    centre = (x + width // 2, y + height // 2)  # of the bounding box: anything else shifts the donor
    # Copies, because seamlessClone writes into its mask.
    result = cv2.seamlessClone(donor.copy(), target.copy(), inner.copy(), centre, cv2.NORMAL_CLONE)
    return result if _difference(result, target, mask) >= MIN_CHANGE else None


def _soft(target: np.ndarray, donor: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Blend in the donor, fading out towards the mask's edge."""
    marked = mask.astype(np.uint8)
    feather = max(1.0, FEATHER * min(cv2.boundingRect(marked)[2:]))
    return _mix(target, donor, np.clip(cv2.distanceTransform(marked, cv2.DIST_L2, 3) / feather, 0, 1))


def _mix(target: np.ndarray, other: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    start = target.astype(np.float32)
    return _to_bytes(start + alpha[..., None] * (other - start))


def _surroundings(mask: np.ndarray) -> np.ndarray:
    grown = cv2.dilate(mask.astype(np.uint8), np.ones((RING, RING), np.uint8))
    return grown.astype(bool) & ~mask


def _difference(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> float:
    """Return the root mean square difference over marked pixels; 0 if none is marked, as around a full-size mask."""
    if not where.any():
        return 0.0
    return float(np.sqrt(np.mean((a[where].astype(np.float32) - b[where]) ** 2)))


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)
