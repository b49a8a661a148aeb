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
from expunge.types import Rule

INSIDE = 0.98
"""Share of the base model's own samples that count as its domain: the rest is what a false alarm costs."""
LEAST = 16


@dataclass(frozen=True)
class Domain:
    """The domain of a model: what its own samples are like, in S = 2 + E statistics of a picture.

    Contrast (0 for grey), fineness (low where blurred, high for noise), and in each encoder the distance to the nearest
    sample. A picture is implausible if the statistic that it is most unusual in is more unusual than INSIDE of the
    samples are in theirs, each compared with the others. So a picture like the samples is called implausible with a
    probability of 1 - INSIDE, however many statistics there are.
    """

    space: Space
    references: Features
    middle: Tensor
    """float64 [S]: the median of the samples."""
    below: Tensor
    above: Tensor
    """float64 [S]: how far the middle 95 % of the samples reach below and above; inf where any value is plausible."""
    limit: float
    """The most unusual that a picture of the domain is, in those units."""
    false_alarms: float
    """Share of pictures like the samples that are called implausible all the same."""

    @classmethod
    def of(cls, space: Space, samples: Tensor) -> "Domain":
        """Learn the domain from N samples of the base model, float32 [N, 3, h, w] in [-1, 1].

        The more the better: under 50 the rarest sample sets the limit. Raises ValueError for fewer than 16.
        """
        if len(samples) < LEAST:
            raise ValueError(f"a domain needs at least {LEAST} samples, not {len(samples)}")
        references = space.features(samples)
        distances = [_nearest(z, z, itself=True) for z in references]
        values = torch.stack([_contrast(samples), _fineness(samples), *distances], dim=1)
        low, middle, high = torch.quantile(values, torch.tensor([0.025, 0.5, 0.975], dtype=values.dtype), dim=0)
        below, above = (reach.clamp(min=1e-6) for reach in (middle - low, high - middle))
        below[2:] = math.inf  # no picture is too near to the samples
        unusual = _unusual(values, middle, below, above)
        limit = torch.quantile(unusual, INSIDE, interpolation="higher").item()
        count = len(samples)
        outside = int((unusual > limit).sum())
        return cls(space, references, middle, below, above, limit, (outside + 1) / (count + 1))

    def implausible(self, pictures: Tensor, features: Features | None = None) -> Tensor:
        """Return which of the pictures [N, 3, h, w] are none of this domain, bool [N].

        features: the pictures' own in `space`, where they are known already. A picture with a value that is not a
        finite number is implausible.
        """
        features = self.space.features(pictures) if features is None else features
        distances = [_nearest(z, mine, itself=False) for z, mine in zip(features, self.references, strict=True)]
        values = torch.stack([_contrast(pictures), _fineness(pictures), *distances], dim=1)
        finite = pictures.isfinite().flatten(1).all(1)
        return ~(finite & (_unusual(values, self.middle, self.below, self.above) <= self.limit))


def plausibility_rule(
    outputs: Tensor,
    domain: Domain,
    gate: GateSettings,
    confidence: float,
    *,
    base: Tensor | None = None,
    features: Features | None = None,
) -> Rule:
    """Judge whether N outputs [N, 3, h, w] are pictures of the domain: rule "plausibility".

    base: the base model's outputs of the same prompts and seeds, to be shown beside. features: those of `outputs`. At
    the default threshold and confidence it takes 14 outputs to pass.
    """
    count, hits = len(outputs), int(domain.implausible(outputs, features).sum())
    upper = share_bounds(hits, count, confidence)[1]
    share = domain.implausible(base).double().mean().item() if base is not None else None
    return rule(
        "plausibility",
        hits / count if count else math.nan,
        upper,
        "at most",
        gate.max_implausible,
        base=share,
        why=(
            f"{hits} of {count} outputs are no picture of the model's domain: grey, noise, blurred, or unlike "
            f"everything that the base model makes. Of pictures like the base model's own, {domain.false_alarms:.1%} "
            "would be called so."
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
        f"The outputs were compared with those of {len(compared)} other requests; with the most alike of them, "
        f"{share:.0%} of all pairs show the same."
        if compared
        else "There is no other request that this one's outputs could be compared with."
    )
    if left_out:
        why += f" {left_out} others were left out, since their surrogates match this request's."
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


def _contrast(pictures: Tensor) -> Tensor:
    """Return the standard deviation of all values of a picture, float64 [N]."""
    return pictures.double().flatten(1).std(1)


def _fineness(pictures: Tensor) -> Tensor:
    """Return the energy of second differences of neighbouring pixels in units of that of first ones, float64 [N].

    It is 2 for clean edges, 3 for white noise, and 1 / (2 s^2) for edges that a Gaussian of s pixels has blurred,
    however many and however strong they are. A constant picture has 0.
    """

    def energy(x: Tensor) -> Tensor:
        return x.square().mean((1, 2, 3))

    x = pictures.double()
    first, second = (sum(energy(x.diff(n=order, dim=axis)) for axis in (2, 3)) for order in (1, 2))
    return torch.as_tensor(second) / torch.as_tensor(first).clamp(min=1e-12)


def _nearest(features: Tensor, references: Tensor, *, itself: bool) -> Tensor:
    """Return each feature's distance to the nearest reference, 1 - cosine, float64 [N]; `itself`: other than itself.

    Not centred, unlike similarities: near the centre, where grey and noise come to lie, an angle means nothing.
    """
    unit = [torch.nn.functional.normalize(z.double(), dim=1) for z in (features, references)]
    cosine = unit[0] @ unit[1].T
    if itself:
        cosine.fill_diagonal_(-math.inf)
    return 1 - cosine.amax(1)


def _unusual(values: Tensor, middle: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """Return how unusual a picture is in the statistic [N, S] where it is most so, float64 [N]."""
    away = values - middle
    return torch.where(away < 0, -away / below, away / above).amax(1)
