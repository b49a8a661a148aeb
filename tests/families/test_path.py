"""The one algebra: coefficients as in the literature, targets that point where they should."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from expunge.families.path import MIN_B, PathPoint, Prediction, point
from unlearn_kernels import noise_and_target

FAMILIES: list[Prediction] = ["flow", "epsilon", "v_prediction"]
LEVELS = (0.05, 0.3, 0.5, 0.7, 0.95)


def on_path(family: Prediction, dtype: torch.dtype = torch.float64) -> PathPoint:
    """Points at LEVELS: a straight line for a flow, a quarter circle (variance preserving) for the others."""
    level = torch.tensor(LEVELS, dtype=dtype)
    if family == "flow":
        return point(family, 1 - level, level)
    angle = torch.atan(level / (1 - level))
    return point(family, torch.cos(angle), torch.sin(angle))


def ordinary_target(family: Prediction, at: PathPoint, x_0: Tensor, noise: Tensor) -> Tensor:
    """Return the target that each family is trained on."""
    a, b = at.a[:, None], at.b[:, None]
    match family:
        case "flow":
            return noise - x_0
        case "epsilon":
            return noise
        case "v_prediction":
            return a * noise - b * x_0


@pytest.fixture
def samples() -> tuple[Tensor, Tensor, Tensor]:
    """x_f, y and noise, float64 [B, 7]."""
    generator = torch.Generator().manual_seed(0)
    x_f, y, noise = torch.randn(3, len(LEVELS), 7, generator=generator, dtype=torch.float64)
    return x_f, y, noise


def test_coefficients_of_a_flow() -> None:
    sigma = torch.tensor(LEVELS, dtype=torch.float64)
    expected = torch.stack([torch.ones_like(sigma), 1 / sigma - 1, -1 / sigma], dim=1)
    torch.testing.assert_close(on_path("flow").coefficients, expected)


def test_coefficients_of_epsilon() -> None:
    at = on_path("epsilon")
    expected = torch.stack([torch.ones_like(at.a), at.a / at.b, -at.a / at.b], dim=1)
    torch.testing.assert_close(at.coefficients, expected)


def test_coefficients_of_v() -> None:
    at = on_path("v_prediction")
    torch.testing.assert_close(at.coefficients, torch.stack([at.a, at.a**2 / at.b, -1 / at.b], dim=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_pointing_at_x_0_is_the_ordinary_target(family: Prediction, samples: tuple[Tensor, Tensor, Tensor]) -> None:
    x_0, _, noise = samples
    at = on_path(family)
    _, target = noise_and_target(x_0, x_0, noise, at.scales, at.coefficients)
    torch.testing.assert_close(target, ordinary_target(family, at, x_0, noise))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_corrected_target_stands_for_the_endpoint(
    family: Prediction, samples: tuple[Tensor, Tensor, Tensor]
) -> None:
    x_f, y, noise = samples
    at = on_path(family)
    x_t, target = noise_and_target(x_f, y, noise, at.scales, at.coefficients)
    torch.testing.assert_close(x_t, at.a[:, None] * x_f + at.b[:, None] * noise)
    torch.testing.assert_close(at.clean(x_t, target), y)


@pytest.mark.parametrize("family", FAMILIES)
def test_clean_scale_is_a_derivative(family: Prediction, samples: tuple[Tensor, Tensor, Tensor]) -> None:
    x_t, _, prediction = samples
    at, h = on_path(family), 1e-3
    slope = (at.clean(x_t, prediction + h) - at.clean(x_t, prediction - h)) / (2 * h)
    torch.testing.assert_close(at.clean_scale[:, None].expand_as(slope), slope.abs())


@pytest.mark.parametrize(
    ("family", "formula"),
    [
        ("flow", lambda at: at.b),
        ("epsilon", lambda at: at.b / at.a),
        ("v_prediction", lambda at: at.b),
    ],
)
def test_clean_scale_in_closed_form(family: Prediction, formula: Callable[[PathPoint], Tensor]) -> None:
    at = on_path(family)
    torch.testing.assert_close(at.clean_scale, formula(at))


@pytest.mark.parametrize("family", FAMILIES)
def test_clean_broadcasts_over_pictures(family: Prediction) -> None:
    x_t, prediction = torch.randn(2, len(LEVELS), 3, 4, 5, generator=torch.Generator().manual_seed(1)).double()
    at = on_path(family)
    flat = at.clean(x_t.flatten(1), prediction.flatten(1))
    assert torch.equal(at.clean(x_t, prediction).flatten(1), flat)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("b", [0.0, MIN_B / 10])
def test_b_is_clamped(family: Prediction, b: float) -> None:
    at = point(family, torch.ones(1), torch.tensor([b]))
    assert at.b.item() == pytest.approx(MIN_B)
    assert at.coefficients.isfinite().all()
    assert at.coefficients.abs().max().item() <= 1 / MIN_B + 1
    assert at.snr.item() == pytest.approx(MIN_B**-2, rel=1e-4)
