"""Each weighting against its closed form, and the bound that it is there for."""

import math

import pytest
import torch
from torch import Tensor

from expunge.families.path import MIN_B, PathPoint, Prediction, point
from expunge.settings import TrainingSettings
from expunge.unlearning.weighting import WEIGHTINGS, band, min_snr, uniform, x0

FAMILIES: list[Prediction] = ["flow", "epsilon", "v_prediction"]
GAMMAS = (0.5, 1.0, 5.0)


def path(family: Prediction, lowest: float = 0.02) -> PathPoint:
    level = torch.linspace(lowest, 0.98, 49, dtype=torch.float64)
    if family == "flow":
        return point(family, 1 - level, level)
    angle = torch.atan(level / (1 - level))
    return point(family, angle.cos(), angle.sin())


def clean_error(family: Prediction, at: PathPoint) -> Tensor:
    """(d x_0 / d prediction)^2, as the design states it."""
    return (at.b / at.a) ** 2 if family == "epsilon" else at.b**2


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform(family: Prediction) -> None:
    at = path(family)
    assert torch.equal(uniform(at, TrainingSettings()), torch.ones_like(at.a))


@pytest.mark.parametrize("family", FAMILIES)
def test_x0(family: Prediction) -> None:
    at = path(family)
    torch.testing.assert_close(x0(at, TrainingSettings()), clean_error(family, at).clamp_max(4))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("family", FAMILIES)
def test_min_snr(family: Prediction, gamma: float) -> None:
    at = path(family)
    snr = (at.a / at.b) ** 2
    expected = torch.minimum(snr, torch.tensor(gamma, dtype=torch.float64)) * clean_error(family, at)
    torch.testing.assert_close(min_snr(at, TrainingSettings(min_snr_gamma=gamma)), expected)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_min_snr_for_epsilon_as_in_the_paper(gamma: float) -> None:
    at = path("epsilon")
    snr = (at.a / at.b) ** 2
    expected = torch.minimum(torch.ones_like(snr), gamma / snr)
    torch.testing.assert_close(min_snr(at, TrainingSettings(min_snr_gamma=gamma)), expected)


@pytest.mark.parametrize(("level", "width"), [(0.45, 0.8), (0.3, 0.5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_band(family: Prediction, level: float, width: float) -> None:
    at, training = path(family), TrainingSettings(band_level=level, band_width=width)
    ratio = at.b / at.a
    bell = torch.exp(-((ratio.log() - math.log(level / (1 - level))) ** 2) / (2 * width**2))
    torch.testing.assert_close(band(at, training), bell * min_snr(at, training), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["min_snr", "band"])
def test_the_correction_stays_bounded_towards_zero_noise(name: str, family: Prediction, gamma: float) -> None:
    """The corrected target is off by c_s (x_s - x_f); its weighted square is at most gamma (in clean-image space)."""
    at = path(family, lowest=MIN_B)
    weighted = WEIGHTINGS[name](at, TrainingSettings(min_snr_gamma=gamma)) * at.coefficients[:, 2] ** 2
    assert weighted.max().item() <= gamma * (1 + 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_weighting_it_does_not(family: Prediction) -> None:
    at = path(family, lowest=MIN_B)
    assert (at.coefficients[:, 2] ** 2).max().item() > 1e5


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (0.0, 1.0)])
def test_finite_at_both_ends(name: str, family: Prediction, a: float, b: float) -> None:
    if family == "epsilon" and a == 0:
        a = 6e-3  # no schedule of an epsilon model ends at a = 0: x_0 could not be told from it
    weight = WEIGHTINGS[name](point(family, torch.tensor([a]), torch.tensor([b])), TrainingSettings())
    assert weight.dtype == torch.float32
    assert weight.isfinite().all()
    assert (weight >= 0).all()
