"""Each metric against its definition, its bounds, and what it refuses."""

import math
from collections.abc import Callable

import pytest
import torch

from expunge.evaluation import metrics


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def features(count: int, seed: int, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)) + offset


def test_psnr_is_the_formula_a_pair(images: torch.Tensor) -> None:
    after = images.clone()
    after[1] += 0.2
    values = metrics.psnr(images, after)
    assert values[0] == metrics.PSNR_CAP
    assert values[1].item() == pytest.approx(10 * math.log10(4 / 0.04), abs=1e-4)


def test_psnr_is_capped_for_a_vanishing_error(images: torch.Tensor) -> None:
    assert metrics.psnr(images, images + 1e-12).max() <= metrics.PSNR_CAP


def test_opposite_images_have_zero_decibels() -> None:
    ones = torch.ones(1, 1, 8, 8)
    assert metrics.psnr(ones, -ones).item() == pytest.approx(0)


@pytest.mark.parametrize("shape", [(2, 3, 24, 24), (2, 1, 24, 24), (1, 3, 32, 48), (1, 1, 3, 5), (1, 3, 6, 6)])
def test_ssim_is_one_for_equal_images_of_any_size(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert metrics.ssim(x, x).tolist() == pytest.approx([1.0] * shape[0])


def test_ssim_falls_with_noise_and_pairs_by_row(images: torch.Tensor) -> None:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    strength = torch.tensor([0.0, 0.1, 0.3, 1.0]).view(-1, 1, 1, 1)
    values = metrics.ssim(images, images + strength * noise).tolist()
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.5


def test_ssim_refuses_two_pixels() -> None:
    with pytest.raises(ValueError, match="at least 3 pixels"):
        metrics.ssim(torch.zeros(1, 3, 2, 9), torch.zeros(1, 3, 2, 9))


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim])
def test_pairs_must_have_one_shape(metric: Callable[..., torch.Tensor], images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="of one shape"):
        metric(images, images[:2])


def test_kid_is_the_sum_over_pairs() -> None:
    a, b = features(5, 0).double(), features(7, 1, 0.3).double()

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return ((x @ y).item() / 16 + 1) ** 3

    aa = sum(kernel(a[i], a[j]) for i in range(5) for j in range(5) if i != j) / 20
    bb = sum(kernel(b[i], b[j]) for i in range(7) for j in range(7) if i != j) / 42
    ab = sum(kernel(x, y) for x in a for y in b) / 35
    assert metrics.kid(a, b) == pytest.approx(aa + bb - 2 * ab)


def test_kid_is_unbiased() -> None:
    """Over many draws from one distribution the mean is 0, within four standard errors."""
    draws = torch.tensor([metrics.kid(features(16, 2 * i), features(16, 2 * i + 1)) for i in range(300)])
    assert draws.min() < 0
    assert abs(draws.mean()) < 4 * draws.std() / math.sqrt(len(draws))


def test_kid_grows_with_distance() -> None:
    near, far = (metrics.kid(features(64, 0), features(64, 1, offset)) for offset in (0.2, 1.0))
    assert 0 < near < far


@pytest.mark.parametrize(("a", "b"), [(torch.zeros(1, 4), torch.zeros(5, 4)), (torch.zeros(5, 4), torch.zeros(5, 3))])
def test_kid_refuses_what_has_no_pairs(a: torch.Tensor, b: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="kid needs"):
        metrics.kid(a, b)


def test_the_kid_test_finds_a_difference_and_is_fair_without_one() -> None:
    """p-values of equal distributions are spread evenly: of 100, at most 16 lie below 0.1 in 97 of 100 cases."""
    ps = [metrics.kid_test([features(16, 2 * i)], [features(16, 2 * i + 1)], permutations=99).p for i in range(100)]
    assert sum(p < 0.1 for p in ps) <= 16
    assert sum(p > 0.5 for p in ps) >= 35
    assert metrics.kid_test([features(16, 0)], [features(16, 1, 1.0)]).p == pytest.approx(0.001)


def test_the_kid_test_measures_kid() -> None:
    a, b = [features(9, 0), features(9, 2)], [features(9, 1), features(9, 3, 2.0)]
    test = metrics.kid_test(a, b)
    assert test.distances == pytest.approx([metrics.kid(*pair) for pair in zip(a, b, strict=True)])
    assert test.worst == 1


def test_one_of_several_encoders_is_enough_for_the_kid_test() -> None:
    same = [features(32, i) for i in range(6)]
    assert metrics.kid_test(same[:3], same[3:]).p > 0.01
    assert metrics.kid_test([*same[:2], features(32, 9, 0.8)], same[3:]).p < 0.01


def test_the_kid_test_allows_prompts_that_differ() -> None:
    """Two clusters of prompts, in the same order in both sets: that is no difference between them."""
    prompts = torch.cat([torch.zeros(16, 16), torch.full((16, 16), 5.0)])
    assert metrics.kid_test([features(32, 0) + prompts], [features(32, 1) + prompts]).p > 0.01


def test_the_kid_test_never_clears_features_that_are_no_numbers() -> None:
    assert metrics.kid_test([features(8, 0) * float("nan")], [features(8, 1)]).p == 0


def test_the_kid_test_needs_rows_that_pair_up() -> None:
    with pytest.raises(ValueError, match="pair up"):
        metrics.kid_test([features(8, 0)], [features(9, 1)])


def test_the_share_of_foreign_samples_that_is_found_falls_with_their_distance_and_number() -> None:
    def found(n: int, offset: float) -> float | None:
        return metrics.foreign_share_found(
            [features(n, 0)], [features(n, 1)], [features(n, 2, offset)], level=0.05, trials=20
        )

    near, far, more = found(24, 1.0), found(24, 3.0), found(96, 1.0)
    assert near is not None
    assert far is not None
    assert more is not None
    assert far < near
    assert more < near
    assert found(24, 0.0) is None


def test_the_stated_power_holds_on_new_samples() -> None:
    """Twice the share that was found with 80 % is found nearly always."""
    n = 48
    share = metrics.foreign_share_found([features(n, 0)], [features(n, 1)], [features(n, 2, 2.0)], level=0.05)
    assert share is not None
    count, hits = min(n, round(2 * share * n)), 0
    for i in range(10, 40):
        mixed = torch.cat([features(n, 3 * i, 2.0)[:count], features(n, 3 * i + 1)[count:]])
        hits += metrics.kid_test([mixed], [features(n, 3 * i + 2)], permutations=199).p < 0.05
    assert hits >= 24


def test_the_frechet_distance_of_gaussians_is_the_formula() -> None:
    """Means 3 apart, deviations 1 and 2 in 8 dimensions: 9 + 8 (2 - 1)^2 = 17, up to what 5,000 samples leave open."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5000, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    b = 2 * b
    b[:, 0] += 3
    assert metrics.frechet(a, b) == pytest.approx(17, abs=1)
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_the_frechet_distance_refuses_few_samples() -> None:
    with pytest.raises(ValueError, match="at least 80 samples"):
        metrics.frechet(features(79, 0), features(200, 1))


def test_the_bounds_of_a_share_are_exact() -> None:
    """Without hits the upper bound is 1 - alpha^(1/n), with nothing but hits the lower is alpha^(1/n)."""
    assert metrics.share_bounds(0, 32, 0.95) == pytest.approx((0.0, 1 - 0.05 ** (1 / 32)))
    assert metrics.share_bounds(32, 32, 0.95) == pytest.approx((0.05 ** (1 / 32), 1.0))
    lower, upper = metrics.share_bounds(8, 32, 0.95)
    assert lower < 0.25 < upper
    assert metrics.share_bounds(0, 0, 0.95) == (0.0, 1.0)


def test_the_bound_of_a_median_is_an_order_statistic() -> None:
    """Of 32 values, the eleventh lies below the median with 97 %, the twelfth with under 95 %."""
    values = torch.arange(1.0, 33.0)
    assert metrics.quantile_bound(values, 0.5, 0.95) == 11
    assert metrics.quantile_bound(values[:3], 0.5, 0.95) == -math.inf


def test_centred_cosine_takes_the_common_part_away() -> None:
    centre = torch.full((16,), 50.0)
    x = features(3, 0)
    assert metrics.centred_cosine(centre + x, centre + x, centre).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    assert metrics.centred_cosine(centre - x, centre + x, centre).tolist() == pytest.approx([-1.0] * 3, abs=1e-5)
    raw = torch.nn.functional.cosine_similarity(centre + x[:1], centre - x[:1])
    assert raw.item() > 0.9  # what centring is for


def test_a_feature_at_the_centre_has_no_similarity() -> None:
    centre = features(1, 0)[0]
    assert metrics.centred_cosine(centre[None], centre + 1, centre).tolist() == [0.0]
