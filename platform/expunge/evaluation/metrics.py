"""The metrics, as pure functions. Images are float [B, C, H, W] in [-1, 1], features are float [B, D]."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PEAK = 2.0  # the width of [-1, 1]
PSNR_CAP = 100.0
SSIM_WINDOW = 7
PERMUTATIONS = 999
SMALLEST_P = 1 / (PERMUTATIONS + 1)
SAMPLES_PER_DIMENSION = 10
FRECHET_DIMENSIONS = 8
FRECHET_SAMPLES = SAMPLES_PER_DIMENSION * FRECHET_DIMENSIONS
"""Fewer samples give no Frechet distance."""


def share_bounds(hits: int, count: int, confidence: float) -> tuple[float, float]:
    """Return the exact lower and upper bound of a share of which `hits` of `count` draws are known.

    Clopper and Pearson 1934. Each bound holds on its own with `confidence`; with no draws they are 0 and 1.
    """
    from scipy.stats import binomtest

    if count == 0:
        return 0.0, 1.0
    lower, upper = (binomtest(hits, count, alternative=side).proportion_ci(confidence) for side in ("greater", "less"))
    return float(lower.low), float(upper.high)


def quantile_bound(values: Tensor, quantile: float, confidence: float) -> float:
    """Return the exact lower bound of a quantile of the distribution that `values` [n] are from; -inf if n is too few.

    It is an order statistic (Conover 1999), so it assumes nothing but independent draws.
    """
    from scipy.stats import quantile_test

    test = quantile_test(values.double().cpu().numpy(), p=quantile, alternative="greater")
    low = float(test.confidence_interval(confidence).low)
    return -math.inf if math.isnan(low) else low


def psnr(before: Tensor, after: Tensor) -> Tensor:
    """Return each pair's peak signal-to-noise ratio, float64 [B] in dB: 10 log10(peak^2 / mean squared error), peak 2.

    Values are capped at 100 dB, which equal images get.
    """
    _same_shape(before, after)
    error = (before.double() - after.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(PEAK**2 / error)).clamp(max=PSNR_CAP)


def ssim(before: Tensor, after: Tensor) -> Tensor:
    """Return each pair's structural similarity, float64 [B] in [-1, 1]: the mean over pixels and channels.

    Wang et al. 2004. The window is uniform, 7 pixels wide, or the largest odd width that fits into a smaller image.
    Raises ValueError for images under 3 pixels.
    """
    from skimage.metrics import structural_similarity

    _same_shape(before, after)
    side = min(before.shape[-2:])
    if side < 3:
        raise ValueError(f"structural similarity needs images of at least 3 pixels per side, not {side}")
    window = min(SSIM_WINDOW, side if side % 2 else side - 1)
    values = [
        structural_similarity(
            a.double().cpu().numpy(), b.double().cpu().numpy(), win_size=window, channel_axis=0, data_range=PEAK
        )
        for a, b in zip(before, after, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def kid(features_a: Tensor, features_b: Tensor) -> float:
    """Return the kernel distance of two sets [A, D] and [B, D]: unbiased MMD^2 with k(x, y) = (x.y / D + 1)^3.

    Binkowski et al. 2018, over the whole sets rather than averaged over subsets. It is 0 on average if both sets come
    from one distribution, so a single value may be negative. Raises ValueError for fewer than two samples per set.
    """
    a, b = features_a.double(), features_b.double()
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"kid needs [A, D] and [B, D] with A, B >= 2, not {tuple(a.shape)} and {tuple(b.shape)}")

    def within(x: Tensor) -> Tensor:
        """Average over pairs of different samples: leaving out the diagonal makes the estimate unbiased."""
        gram = _kernel(x, x)
        return (gram.sum() - gram.diagonal().sum()) / (len(x) * (len(x) - 1))

    return (within(a) + within(b) - 2 * _kernel(a, b).mean()).item()


@dataclass(frozen=True)
class KidTest:
    """The outcome of a permutation test of whether two sets are from one distribution."""

    distances: tuple[float, ...]
    """`kid` as each encoder sees it."""
    worst: int
    """The encoder whose distance stands out most."""
    p: float
    """Share of the permutations that stand out as much, the data itself included: small if the sets differ."""


def kid_test(a: Sequence[Tensor], b: Sequence[Tensor], *, permutations: int = PERMUTATIONS, seed: int = 0) -> KidTest:
    """Test whether two sets of samples, seen by one or more encoders e, are from one distribution.

    a, b: float [n, D_e] each. Row i of both must have the same prompt, but noise of its own. A permutation swaps such
    rows, so the p-value is exact whatever the mix of prompts. The statistic is the largest over the encoders of `kid`
    in units of its spread over the permutations: several encoders need no correction. Non-finite features give p = 0.
    Raises ValueError where the sets do not pair up, or hold fewer than two samples.
    """
    n = len(a[0])
    if n < 2 or any(x.ndim != 2 or x.shape != y.shape or len(x) != n for x, y in zip(a, b, strict=True)):
        raise ValueError("kid_test needs two sets of at least two samples that pair up row by row")
    pools = [torch.cat(pair).double() for pair in zip(a, b, strict=True)]
    if not all(bool(pool.isfinite().all()) for pool in pools):
        return KidTest((math.nan,) * len(pools), 0, 0.0)
    swap = torch.rand(permutations + 1, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    swap[0] = False  # the data as it is
    ours = torch.cat([~swap, swap], dim=1).double()
    distances = torch.stack([_kid_of_splits(_kernel(pool, pool), ours) for pool in pools], dim=1)
    spread = distances.std(0).clamp(min=torch.finfo(torch.float64).tiny)
    outstanding = (distances - distances.mean(0)) / spread
    statistic = outstanding.amax(1)
    p = (statistic >= statistic[0] - 1e-9).double().mean().item()
    return KidTest(tuple(distances[0].tolist()), int(outstanding[0].argmax()), p)


def foreign_share_found(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    foreign: Sequence[Tensor],
    *,
    level: float,
    power: float = 0.8,
    trials: int = 20,
    seed: int = 0,
) -> float | None:
    """Return the smallest share of foreign samples that `kid_test` finds with probability `power`, or None.

    a, b: the base model's own samples, [n, D_e] for each encoder, paired as `kid_test` needs them. foreign: [n, D_e]
    that stand in for rows of `a`, row by row. level: a p-value below it counts as found. Each trial divides the pairs
    anew between the two sets; the share is found by bisection, as more foreign samples are easier to find.
    """
    n, generator = len(a[0]), torch.Generator().manual_seed(seed)
    # The smallest p-value of a test is 1 / (permutations + 1), which must be well below the level.
    permutations = PERMUTATIONS if level < 0.01 else 399
    divisions = [
        (torch.rand(n, 1, generator=generator) < 0.5, torch.randperm(n, generator=generator)) for _ in range(trials)
    ]

    def found(count: int) -> bool:
        hits = 0
        for trial, (swap, order) in enumerate(divisions):
            chosen = torch.zeros(n, 1, dtype=torch.bool)
            chosen[order[:count]] = True
            mixed = [torch.where(chosen, z, torch.where(swap, y, x)) for x, y, z in zip(a, b, foreign, strict=True)]
            rest = [torch.where(swap, x, y) for x, y in zip(a, b, strict=True)]
            hits += kid_test(mixed, rest, permutations=permutations, seed=seed + trial).p < level
        return hits >= power * trials

    if not found(n):
        return None
    low, high = 0, n
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return high / n


def frechet(features_a: Tensor, features_b: Tensor) -> float:
    """Return the Frechet distance of two sets [A, D] and [B, D], each taken for a Gaussian.

    It is FID's formula (Heusel et al. 2017) within the leading principal components of both sets together, one for
    every ten samples, so values compare only with others of as many samples of the same encoder. In all D dimensions it
    would need some ten thousand samples: a covariance of fewer samples than dimensions is singular, and the distance is
    then mostly the bias of that. Raises ValueError for fewer than 80 samples per set, which leave under 8 dimensions.
    """
    a, b = features_a.double(), features_b.double()
    count = min(len(a), len(b))
    if count < FRECHET_SAMPLES:
        raise ValueError(f"a Frechet distance needs at least {FRECHET_SAMPLES} samples per set, not {count}")
    pool = torch.cat([a, b])
    axes = torch.linalg.svd(pool - pool.mean(0), full_matrices=False).Vh[: count // SAMPLES_PER_DIMENSION]
    x, y = a @ axes.T, b @ axes.T
    values, vectors = torch.linalg.eigh(x.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ y.T.cov() @ root).clamp(min=0).sqrt().sum()
    apart = (x.mean(0) - y.mean(0)).square().sum()
    return (apart + x.T.cov().trace() + y.T.cov().trace() - 2 * shared).item()


def centred_cosine(features: Tensor, reference: Tensor, centre: Tensor) -> Tensor:
    """Return the cosine, float64 [B], of `features` [B, D] and `reference` [D] or [B, D], relative to `centre` [D].

    An encoder's raw features share a large common part, which makes any two images look alike. Subtracting the centre,
    the mean feature of unrelated samples, removes it. A feature at the centre has cosine 0.
    """
    x, y = features.double() - centre.double(), reference.double() - centre.double()
    return torch.nn.functional.cosine_similarity(x, y.expand_as(x), dim=1)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kid_of_splits(gram: Tensor, ours: Tensor) -> Tensor:
    """Return `kid` for each way [P, 2n] to divide 2n samples into halves (1 or 0), float64 [P]; gram: [2n, 2n]."""
    theirs, n = 1 - ours, gram.shape[0] // 2
    sums = ours @ gram
    within = (sums * ours).sum(1) + (theirs @ gram * theirs).sum(1) - gram.diagonal().sum()
    return within / (n * (n - 1)) - 2 * (sums * theirs).sum(1) / n**2


def _same_shape(before: Tensor, after: Tensor) -> None:
    if before.shape != after.shape or before.ndim != 4:
        raise ValueError(
            f"images must be two [B, C, H, W] of one shape, not {tuple(before.shape)} and {tuple(after.shape)}"
        )
