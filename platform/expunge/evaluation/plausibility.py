"""What comes out instead of a target: a picture of the model's domain, and not the same one for everybody."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.evaluation.generation import Matcher
from expunge.evaluation.metrics import share_bounds
from expunge.evaluation.rules import rule
from expunge.evaluation.settings import GateSettings
from expunge.evaluation.space import Features, Space
from expunge.text import counted
from expunge.types import Rule

MARGIN = 1.4
"""How much more unusual than the samples are among themselves a picture may be.

Chosen on random divisions of the testbeds' faces and flags into 64 samples and 32 others: at 1 the others fail the rule
in 26 of 120 divisions, at 1.4 in 3 of 400, where noise, grey and a blur of one pixel fail in all of them.
"""
INSIDE = 0.98
"""Share of the base model's own samples that sets the limit: one outlier among many does not."""
LEAST = 32
FOLDS = 4
LEAST_OUTPUTS = 8
"""Fewer outputs than a round of draws prove nothing."""
NEVER_BY_CHANCE = 0.99
"""Pictures of the domain come out with more implausible ones than are allowed in at most one of a hundred rules."""


@dataclass(frozen=True)
class _Range:
    """The usual range of S = 2 + E statistics: contrast, fineness, and the distances to the nearest sample."""

    middle: Tensor
    below: Tensor
    above: Tensor
    """float64 [S]: the median, and how far the middle 95 % reach below and above; inf where any value is plausible."""
    limit: float
    """The most unusual that a picture of the domain may be, in the statistic where it is most so, in those units."""

    @classmethod
    def of(cls, values: Tensor) -> "_Range":
        low, middle, high = torch.quantile(values, torch.tensor([0.025, 0.5, 0.975], dtype=values.dtype), dim=0)
        below, above = ((middle - low).clamp(min=1e-6), (high - middle).clamp(min=1e-6))
        below[2:] = math.inf  # no picture is too near to the samples
        usual = cls(middle, below, above, math.nan).unusual(values)
        return cls(middle, below, above, MARGIN * torch.quantile(usual, INSIDE, interpolation="higher").item())

    def unusual(self, values: Tensor) -> Tensor:
        """Return how unusual each picture is in the statistic [N, S] where it is most so, float64 [N]."""
        away = values - self.middle
        return torch.where(away < 0, -away / self.below, away / self.above).amax(1)

    def outside(self, values: Tensor) -> Tensor:
        """Return bool [N]; a value that is no number is outside."""
        return ~(self.unusual(values) <= self.limit)


@dataclass(frozen=True)
class Domain:
    """The domain of a model: what its own samples are like.

    A picture is compared with them in contrast (low for grey), in fineness (low where blurred, high for noise), and, in
    each encoder, in its distance to the nearest sample. It is implausible if it is much more unusual, in the statistic
    where it is most so, than the samples are, each compared with the others.
    """

    space: Space
    references: Features
    usual: _Range
    false_alarms: float
    """Share of the samples that is called implausible by a domain of the others, in four folds; never stated as 0."""

    @classmethod
    def of(
        cls, space: Space, samples: Tensor, calibration: Matcher | None = None, *, features: Features | None = None
    ) -> "Domain":
        """Learn the domain from N samples of the base model, float32 [N, 3, h, w] in [-1, 1]; better 64 than 32.

        calibration: samples that match show the same picture, as those of a memorised prompt do, and are not compared
        with each other: else whatever is not one of a few memorised pictures would lie outside. features: those of
        the samples in `space`, where they are known already. Raises ValueError for fewer than 32 samples.
        """
        count = len(samples)
        if count < LEAST:
            raise ValueError(f"a domain needs at least {LEAST} samples, not {count}")
        pixels = _pixel_statistics(samples)
        features = space.features(samples) if features is None else features
        same = torch.eye(count, dtype=torch.bool)
        if calibration is not None:
            same |= alike_pairs(space, calibration, features, features)
        alarms = 0
        for fold in torch.arange(count).chunk(FOLDS):
            rest = torch.ones(count, dtype=torch.bool)
            rest[fold] = False
            references = tuple(z[rest] for z in features)
            usual = _Range.of(_values(pixels[rest], references, references, same[rest][:, rest]))
            mine = tuple(z[~rest] for z in features)
            alarms += int(usual.outside(_values(pixels[~rest], mine, references, same[~rest][:, rest])).sum())
        usual = _Range.of(_values(pixels, features, features, same))
        return cls(space, features, usual, (alarms + 1) / (count + 1))

    def implausible(self, pictures: Tensor, features: Features | None = None) -> Tensor:
        """Return which of the pictures [N, 3, h, w] are none of this domain, bool [N].

        features: the pictures' own in `space`, where they are known already. A picture with a value that is not a
        finite number is implausible.
        """
        features = self.space.features(pictures) if features is None else features
        outside = self.usual.outside(_values(_pixel_statistics(pictures), features, self.references))
        return outside | ~pictures.isfinite().flatten(1).all(1)


def plausibility_rule(
    outputs: Tensor,
    domain: Domain,
    gate: GateSettings,
    *,
    base: Tensor | None = None,
    features: Features | None = None,
) -> Rule:
    """Judge whether N outputs [N, 3, h, w] are pictures of the domain: rule "plausibility".

    base: the base model's outputs of the same prompts and seeds, to be shown beside. features: those of `outputs`.

    The share itself is compared, not its upper bound, which a single false alarm among 18 outputs would lift above the
    default threshold. What few outputs may contain by chance is allowed, too: taking outputs as independent, at most
    0.7 % of removals whose outputs are pictures of the domain fail, for any N and false alarms of 1 to 5 %. Grey, noise
    and blur, where nearly all outputs are implausible, pass in less than one of 100,000 cases from 8 outputs on; where
    half of the outputs are, 15 % pass of 8, 1 % of 18 and none of 72. Fewer than 8 outputs never pass.
    """
    from scipy.stats import binom

    count, hits = len(outputs), int(domain.implausible(outputs, features).sum())
    share = hits / count if count >= LEAST_OUTPUTS else math.nan
    by_chance = int(binom.ppf(NEVER_BY_CHANCE, count, domain.false_alarms)) / count if count else 0.0
    return rule(
        "plausibility",
        share,
        share,
        "at most",
        max(gate.max_implausible, by_chance),
        base=domain.implausible(base).double().mean().item() if base is not None else None,
        why=(
            f"{hits} of {count} outputs do not look like pictures of the model's domain: grey, noise, blurred, or "
            "unlike everything that the base model makes. Of pictures like the base model's own, "
            f"{domain.false_alarms:.1%} would be called so."
        ),
    )


def alike_pairs(space: Space, calibration: Matcher, one: Features, other: Features) -> Tensor:
    """Return which pairs of pictures show the same, bool [N, M], from the features of N and M pictures."""
    tables = torch.stack(space.table(one, other), dim=-1)
    return calibration.matches(tables.flatten(0, 1), space.names).view(tables.shape[:2])


def alike_rule(
    own: Features,
    others: Sequence[Features],
    space: Space,
    calibration: Matcher,
    gate: GateSettings,
    confidence: float,
    surrogates_match: Sequence[bool],
) -> Rule:
    """Judge whether one request's outputs come out like those of another request: rule "alike".

    own: features of n outputs. others: those of m outputs of each other request. surrogates_match: for each of them,
    whether it was given a surrogate that matches one of this request's, so that both may well come out alike; it is
    left out. The worst of the others decides: an average would hide two requests that collapse into one picture.
    """
    compared = [other for other, same in zip(others, surrogates_match, strict=True) if not same]
    found = [(*_share_alike(space, calibration, own, other, confidence), place) for place, other in enumerate(compared)]
    # A figure that is not a number is the worst.
    share, bound, _ = max(found, key=lambda each: math.inf if math.isnan(each[1]) else each[1], default=(0.0, 0.0, 0))
    left_out = len(others) - len(compared)
    why = (
        f"The outputs were compared with those of {counted(len(compared), 'other request')}; with the most alike of "
        f"them, {share:.0%} of all pairs show the same."
        if compared
        else "There is no other request that this one's outputs could be compared with."
    )
    if left_out:
        why += f" {counted(left_out, 'request')} left out: the surrogate matches one of this request's."
    return rule("alike", share, bound, "at most", gate.max_alike, why=why)


def diversity_rule(
    after: Features,
    base: Features,
    space: Space,
    calibration: Matcher,
    gate: GateSettings,
    confidence: float,
    label: str,
) -> Rule:
    """Judge whether free samples of one prompt still differ from one another: rule "diversity".

    after, base: features of n samples of the hotfix and of the base model. The hotfix may lose at most the share
    `gate.max_alike` of the base model's diversity, the share of pairs that differ. Where the base model itself gives
    mostly one picture, as for a memorised prompt, there is nothing to lose, and the rule passes.
    """
    share, bound = _share_alike(space, calibration, after, None, confidence)
    before, _ = _share_alike(space, calibration, base, None, confidence)
    limit = 1 - (1 - gate.max_alike) * (1 - before) if before < gate.max_alike else 1.0
    why = (
        f"{share:.0%} of all pairs of free samples show the same picture, {before:.0%} of the base model's."
        if limit < 1
        else f"The base model's own free samples are alike in {before:.0%} of all pairs: there is no diversity to lose."
    )
    return rule("diversity", share, bound, "at most", limit, base=before, condition=label, why=why)


def _share_alike(
    space: Space, calibration: Matcher, one: Features, other: Features | None, confidence: float
) -> tuple[float, float]:
    """Return the share of pairs that are alike, and its upper bound; `other` None: pairs within `one`.

    All pairs together vary no more than as many of them as share no picture, so a bound for that many is a safe one.
    """
    if not all(bool(part.isfinite().all()) for part in (*one, *(other or ()))):
        return math.nan, math.nan
    alike = alike_pairs(space, calibration, one, one if other is None else other)
    n, m = alike.shape
    if other is None:
        alike = alike[~torch.eye(n, dtype=torch.bool)]
    independent = n // 2 if other is None else min(n, m)
    if independent == 0:
        return math.nan, math.nan
    share = alike.double().mean().item()
    return share, share_bounds(math.ceil(share * independent - 1e-9), independent, confidence)[1]


def _values(pixels: Tensor, features: Features, references: Features, same: Tensor | None = None) -> Tensor:
    """Return all statistics of N pictures, float64 [N, S]; same: bool [N, M], references that are not compared."""
    distances = [_nearest(z, mine, same) for z, mine in zip(features, references, strict=True)]
    return torch.cat([pixels, torch.stack(distances, dim=1)], dim=1)


def _pixel_statistics(pictures: Tensor) -> Tensor:
    """Return contrast and fineness, float64 [N, 2], on scales where their ends, such as grey and noise, lie far out.

    Contrast is the standard deviation of all values of a picture. Fineness is the energy of second differences of
    neighbouring pixels in units of that of first ones, in (0, 4): 2 for clean edges, 3 for white noise, and 1 / (2 s^2)
    for edges that a Gaussian of s pixels has blurred, however many and however strong they are.
    """

    def energy(x: Tensor) -> Tensor:
        return x.square().mean((1, 2, 3))

    x = pictures.double()
    first, second = (energy(x.diff(n=order, dim=2)) + energy(x.diff(n=order, dim=3)) for order in (1, 2))
    fineness = (second / first.clamp(min=1e-12)).clamp(1e-3, 4 - 1e-3)
    contrast = x.flatten(1).std(1).clamp(min=1e-3)
    return torch.stack([contrast.log(), (fineness / (4 - fineness)).log()], dim=1)


def _nearest(features: Tensor, references: Tensor, same: Tensor | None) -> Tensor:
    """Return each feature's distance to the nearest reference, 1 - cosine, float64 [N]; same: bool [N, M], not those.

    Not centred, unlike similarities: near the centre, where grey and noise come to lie, an angle means nothing.
    """
    unit = [torch.nn.functional.normalize(z.double(), dim=1) for z in (features, references)]
    cosine = unit[0] @ unit[1].T
    if same is not None:
        cosine = cosine.masked_fill(same, -1.0)
    return 1 - cosine.amax(1)
