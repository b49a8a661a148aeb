"""Match thresholds: from which similarity on two pictures show the same, and how often that is wrong.

A *matching pair* is a picture and an altered copy of it: moved, mirrored, tinted, blurred. A *non-matching pair* is two
different pictures of the model's domain. Similarity is that of the verdict: to the nearest view of the picture.

The threshold of an encoder is the smallest similarity at which at most FALSE_MATCH of the non-matching pairs match.
From 1 / FALSE_MATCH pairs on they are counted. Below that no pair may match, and the threshold is not smaller than the
quantile of a normal distribution on Fisher's z scale that has the pairs' mean and deviation. Pairs share pictures, so
they are not independent: a rate is less certain than their number suggests.

Where the pictures are samples of the model itself, two of them may show the same memorised picture. Then nothing can be
counted: the quantile alone decides, with median and median absolute deviation, which few such pairs do not move.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from scipy import stats
from torch import Tensor
from torch.nn import functional

from expunge.evaluation.reference import warped
from expunge.evaluation.rules import PROTOCOL_VERSION
from expunge.evaluation.space import Features, Space
from expunge.evaluation.views import all_views
from expunge.families import source_digest
from expunge.logs import get_logger
from expunge.settings import Settings
from expunge.types import Value

FALSE_MATCH = 0.001
"""Share of non-matching pairs that an encoder may take for matching ones."""
CONFIDENCE = 0.95
"""Of the bound on `Calibration.chance`."""
FEWEST = 8
"""Pictures of each kind, below which nothing can be said."""

BLUR, NOISE = 0.015, 0.04
"""Of a slightly damaged copy: deviation of the blur in heights of the picture, and of the noise on [-1, 1]."""
TINT = (1.0, 0.6, 0.6)
"""What a tint leaves of red, green and blue: of the light, in [0, 1]."""
WARP = 0.03
"""Strength of a slight warp, as in `reference.warped`."""
SAME = 0.02
"""Pictures whose root mean square difference on [-1, 1] is smaller are one picture, such as a flag that two share."""

_SHIPPED = Path(__file__).parent / "calibrations"
_LARGEST_Z = 1 - 1e-6

How = Literal["counted", "normal tail", "robust normal tail"]


class MatchThreshold(Value):
    """From which similarity on an encoder says that two pictures match, and how often it is wrong."""

    threshold: float
    false_match: float = Field(description="share of non-matching pairs that match, or its estimate")
    missed: float = Field(description="share of matching pairs that do not match")
    matching: int = Field(description="pairs of a picture and an altered copy")
    non_matching: int = Field(description="pairs of different pictures")
    how: How = Field(description="how `threshold` and `false_match` were found")


class Calibration(Value):
    """The match thresholds of one base model."""

    protocol_version: int
    source: str = Field(description="in words, what it was made of and how")
    base: str | None = Field(description="digest of the base model's files")
    thresholds: dict[str, MatchThreshold] = Field(description="by the encoder's name")
    chance: float = Field(
        description="upper bound of the share of pictures that match a picture of something else in any encoder: free "
        "samples and pictures that the model never saw, or, without those, different pictures"
    )
    missed: float = Field(description="share of matching pairs that no encoder finds")

    def matches(self, similarity: Tensor, names: Sequence[str]) -> Tensor:
        """Tell for each row of `similarity` [N, E] whether any encoder says match, bool [N]. names: the E encoders.

        Raises KeyError for an encoder without a threshold.
        """
        return (similarity.double() >= self.limits(names)).any(-1)

    def limits(self, names: Sequence[str]) -> Tensor:
        """Return the thresholds of the encoders `names`, float64 [E]. Raises KeyError for one without."""
        return torch.tensor([self.thresholds[name].threshold for name in names], dtype=torch.float64)


def calibrate(
    space: Space,
    pictures: Tensor | None,
    unseen: Tensor | None,
    samples: Tensor,
    *,
    source: str = "",
    base: str | None = None,
    step: Callable[[], None] = lambda: None,
) -> Calibration:
    """Find the thresholds of the space's encoders.

    pictures [N, 3, h, w]: pictures of the model's domain, such as those it was trained on, each of something else.
    unseen [M, 3, h, w]: pictures of that kind that it never saw. samples [n, 3, h, w]: its own free samples, which also
    stand for `pictures` where there are none. All are float32 in [-1, 1]. step: called after each of the N. Raises
    ValueError for fewer than FEWEST pictures of a kind.
    """
    known = samples if pictures is None else pictures
    for given in (known, samples, *(() if unseen is None else (unseen,))):
        if len(given) < FEWEST:
            raise ValueError(f"a calibration needs {FEWEST} pictures of each kind, not {len(given)}")

    references, matching = [], []
    for picture in known:
        views, copies = space.features(all_views(picture)), space.features(copies_of(picture))
        references.append(views)
        matching.append(space.similarity(copies, views))
        step()
    matching = torch.cat(matching).numpy()

    tables = []
    if unseen is None or pictures is not None:
        originals = tuple(torch.stack([views[e][0] for views in references]) for e in range(len(space.encoders)))
        tables.append(_Table(_to_each(space, originals, references), _different(known)))
    if unseen is not None:
        strangers, views = space.features(unseen), [space.features(all_views(picture)) for picture in unseen]
        tables.append(_Table(_to_each(space, strangers, references)))
        tables.append(_Table(_to_each(space, space.features(samples), views)))

    sure = pictures is not None or unseen is not None
    found = [_threshold(np.concatenate([t.pairs()[:, e] for t in tables]), sure) for e in range(len(space.encoders))]
    limits = np.array([limit for limit, _, _ in found])
    thresholds = {
        name: MatchThreshold(
            threshold=limit,
            false_match=false_match,
            missed=float((matching[:, e] < limit).mean()),
            matching=len(matching),
            non_matching=sum(len(table.pairs()) for table in tables),
            how=how,
        )
        for e, (name, (limit, false_match, how)) in enumerate(zip(space.names, found, strict=True))
    }
    return Calibration(
        protocol_version=PROTOCOL_VERSION,
        source=source,
        base=base,
        thresholds=thresholds,
        chance=_chance(tables, sure),
        missed=float((matching < limits).all(1).mean()),
    )


def copies_of(picture: Tensor) -> Tensor:
    """Return altered copies of `picture` [3, h, w] that still show the same, float32 [C, 3, h, w] in [-1, 1].

    Every view of it, slightly blurred and noisy, so that none is equal to a view; then tinted, with its colours
    rotated by a third, and slightly warped.
    """
    views = all_views(picture)
    generator = torch.Generator().manual_seed(0)
    damaged = _blurred(views) + NOISE * torch.randn(views.shape, generator=generator)
    tint = torch.tensor(TINT).view(3, 1, 1)
    others = [(picture + 1) * tint - 1, picture.roll(1, 0), warped(picture[None], 0, WARP)[0]]
    return torch.cat([damaged, torch.stack(others)]).clamp(-1, 1)


def find_calibration(settings: Settings, model: str, *, base: str | None = None) -> Calibration | None:
    """Return the calibration of a model: one made on this machine, else the one that Expunge brings for a testbed.

    base: digest of the base model's files, where it is known already. A file of another protocol, of other files of
    the base model, or without a threshold for each encoder that is set, is ignored with a line in the log. Raises
    NotFoundError for an unknown model, and InputError where its files are incomplete.
    """
    options = settings.model(model)
    kind, _, name = options.source.partition(":")
    files = [calibration_file(settings, model), *([_SHIPPED / f"{name}.json"] if kind == "testbed" else [])]
    present = [file for file in files if file.is_file()]
    digest = base or (source_digest(options) if present else None)
    for file in present:
        found = _read(file, digest, settings.evaluation.encoders)
        if isinstance(found, Calibration):
            return found
        get_logger("calibration").warning("a calibration is ignored", file=str(file), why=found)
    return None


def calibration_file(settings: Settings, model: str) -> Path:
    """Return where `expunge calibrate MODEL` writes."""
    return settings.home / "calibrations" / f"{model}.json"


def _read(file: Path, digest: str | None, encoders: Sequence[str]) -> Calibration | str:
    """Return the calibration in `file`, or why it is not used."""
    try:
        found = Calibration.model_validate_json(file.read_bytes())
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except ValidationError:
        return "it is damaged, or of another protocol"
    if found.protocol_version != PROTOCOL_VERSION:
        return f"it is of protocol {found.protocol_version}, not {PROTOCOL_VERSION}"
    if found.base != digest:
        return "it was made for other files of the base model"
    missing = [name for name in encoders if name not in found.thresholds]
    return f"it has no threshold for {missing[0]}" if missing else found


@dataclass(frozen=True)
class _Table:
    """Similarity of A pictures to B others, which show something else, unless `different` says no."""

    similarity: np.ndarray
    """float64 [A, B, E]: to the nearest view of the other."""
    different: np.ndarray | None = None
    """bool [A, B]."""

    def pairs(self) -> np.ndarray:
        """Return the non-matching pairs, float64 [P, E]."""
        everything = self.similarity.reshape(-1, self.similarity.shape[-1])
        return everything if self.different is None else everything[self.different.ravel()]

    def half(self, first: bool) -> "_Table":
        """Return the pairs of every second other picture."""
        part = slice(0 if first else 1, None, 2)
        different = None if self.different is None else self.different[:, part]
        return _Table(self.similarity[:, part], different)


def _to_each(space: Space, outputs: Features, references: Sequence[Features]) -> np.ndarray:
    """Return the similarity of A outputs to the nearest view of each of B pictures, float64 [A, B, E]."""
    return torch.stack([space.similarity(outputs, views) for views in references], dim=1).numpy()


def _different(pictures: Tensor) -> np.ndarray:
    """Tell for each pair of N pictures whether they differ, bool [N, N]."""
    distance = torch.cdist(pictures.flatten(1), pictures.flatten(1)) / pictures[0].numel() ** 0.5
    return (distance > SAME).fill_diagonal_(False).numpy()


def _threshold(similarity: np.ndarray, sure: bool) -> tuple[float, float, How]:
    """Return an encoder's threshold, its false match rate, and how they were found. similarity: of P pairs.

    sure: all pairs are of different pictures.
    """
    z = np.arctanh(similarity.clip(-_LARGEST_Z, _LARGEST_Z))
    if not sure:
        centre = np.median(z)
        spread = np.median(np.abs(z - centre)) / stats.norm.ppf(0.75)  # the deviation of a normal distribution
        return float(np.tanh(stats.norm.isf(FALSE_MATCH, centre, spread))), FALSE_MATCH, "robust normal tail"
    allowed = int(FALSE_MATCH * len(similarity))
    above = float(np.nextafter(np.sort(similarity)[-1 - allowed], np.inf))
    if allowed:
        return above, float((similarity >= above).mean()), "counted"
    centre, spread = z.mean(), z.std(ddof=1)
    limit = max(above, float(np.tanh(stats.norm.isf(FALSE_MATCH, centre, spread))))
    rate = stats.norm.sf(np.arctanh(min(limit, _LARGEST_Z)), centre, spread)
    return limit, float(rate), "normal tail"


def _chance(tables: Sequence[_Table], sure: bool) -> float:
    """Return the upper bound of the share of pairs of the last table that match in any encoder.

    Thresholds from one half of the pictures judge the other half, and the other way round. Of two bounds the larger
    counts: the exact one for independent pairs, and Student's over pictures, of which one may resemble many.
    """
    matches, different = [], []
    for first in (True, False):
        others = np.concatenate([table.half(not first).pairs() for table in tables])
        limits = np.array([_threshold(column, sure)[0] for column in others.T])
        mine = tables[-1].half(first)
        matches.append((mine.similarity >= limits).any(2))
        different.append(np.ones(matches[-1].shape, bool) if mine.different is None else mine.different)
    match, valid = np.concatenate(matches, 1), np.concatenate(different, 1)
    hits, pairs = int((match & valid).sum()), int(valid.sum())
    shares = (match & valid).sum(0) / valid.sum(0).clip(1)
    by_pair = stats.binomtest(hits, pairs).proportion_ci(2 * CONFIDENCE - 1, method="exact").high
    by_picture = shares.mean() + stats.t.ppf(CONFIDENCE, len(shares) - 1) * shares.std(ddof=1) / len(shares) ** 0.5
    return float(min(1.0, max(by_pair, by_picture)))


def _blurred(pictures: Tensor) -> Tensor:
    """Blur [N, 3, h, w] by a Gaussian of deviation BLUR x h."""
    deviation = BLUR * pictures.shape[-2]
    radius = max(1, round(3 * deviation))
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / deviation) ** 2)
    weights = (weights / weights.sum()).expand(3, 1, -1)
    padded = functional.pad(pictures, (radius,) * 4, mode="replicate")
    rows = functional.conv2d(padded, weights[:, :, None], groups=3)
    return functional.conv2d(rows, weights[:, :, :, None], groups=3)
