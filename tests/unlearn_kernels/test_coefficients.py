"""The surgery itself: its coefficients on real gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unlearn_kernels import clip_coefficient, combine_, conflicts, cosines, gram, retain_normal

VALUES = st.floats(-1e3, 1e3, allow_nan=False, width=32)


@st.composite
def matrices(draw: st.DrawFn, fewest: int = 2) -> Tensor:
    """float64 [K, N], the last row is the retain gradient."""
    count, size = draw(st.integers(fewest, 6)), draw(st.integers(1, 8))
    rows = draw(st.lists(st.lists(VALUES, min_size=size, max_size=size), min_size=count, max_size=count))
    return torch.tensor(rows, dtype=torch.float64)


def _surgery(gradients: Tensor, forget_weight: float = 1.0) -> Tensor:
    out = torch.empty_like(gradients[0])
    combine_(out, gradients, retain_normal(gram(gradients), forget_weight))
    return out


def _by_definition(gradients: Tensor, forget_weight: float) -> Tensor:
    *forget, retain = gradients
    projected = []
    for gradient in forget:
        against = torch.dot(gradient, retain).clamp(max=0)
        projected.append(gradient - (against / retain.dot(retain)) * retain if retain.any() else gradient)
    return retain + forget_weight * torch.stack(projected).mean(0)


@given(matrices(), st.floats(0, 10))
def test_coefficients_are_the_projection(gradients: Tensor, forget_weight: float) -> None:
    scale = float(gradients.abs().max()) * (1 + forget_weight)
    result, expected = _surgery(gradients, forget_weight), _by_definition(gradients, forget_weight)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-9 * scale + 1e-30)


# float64 runs on the reference, float32 on the C kernels where they are built.
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@given(gradients=matrices())
def test_nothing_is_left_against_the_retain_gradient(gradients: Tensor, dtype: torch.dtype, rounding: float) -> None:
    """<g, r> >= <r, r>: the step does at least for the retained images what the retain gradient alone does."""
    operated, retain = _surgery(gradients.to(dtype)).double(), gradients[-1]
    assert float(operated @ retain) >= float(retain @ retain) - rounding * float(gradients.norm()) ** 2 - 1e-30


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@given(gradients=matrices())
def test_without_conflict_it_is_the_plain_weighted_sum(gradients: Tensor, dtype: torch.dtype, rounding: float) -> None:
    agreeing = gradients.to(dtype)
    agreeing[:-1][conflicts(gram(agreeing))] *= -1
    expected = agreeing[-1].double() + 0.3 * agreeing[:-1].double().mean(0)
    atol = rounding * (1 + float(gradients.abs().max()))
    torch.testing.assert_close(_surgery(agreeing, 0.3).double(), expected, rtol=rounding, atol=atol)


@given(matrices(), st.sampled_from([0.125, 0.5, 4.0, 256.0]))
def test_scaling_every_gradient_scales_the_result(gradients: Tensor, factor: float) -> None:
    """Coefficients do not change, so gradient scaling of mixed precision does not either. Powers of two are exact."""
    matrix = gram(gradients)
    assert torch.equal(retain_normal(gram(factor * gradients)), retain_normal(matrix)) or not matrix[-1, -1] > 1e-30


def test_one_conflict_by_hand() -> None:
    forget, retain = torch.tensor([-1.0, 1.0]), torch.tensor([2.0, 0.0])
    matrix = gram([forget, retain])
    assert torch.equal(conflicts(matrix), torch.tensor([True]))
    torch.testing.assert_close(cosines(matrix), torch.tensor([-math.sqrt(0.5)], dtype=torch.float64))
    combine_(retain, [forget, retain], retain_normal(matrix, forget_weight=0.5))
    assert torch.equal(retain, torch.tensor([2.0, 0.5]))  # r + 0.5 (0, 1)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_zero_retain_gradient_protects_nothing(count: int) -> None:
    gradients = torch.cat([torch.randn(count, 5, dtype=torch.float64), torch.zeros(1, 5, dtype=torch.float64)])
    expected = torch.tensor([0.3 / count] * count + [1.0], dtype=torch.float64)
    torch.testing.assert_close(retain_normal(gram(gradients), 0.3), expected)
    assert torch.equal(cosines(gram(gradients)), torch.zeros(count, dtype=torch.float64))


def test_the_retain_gradient_alone() -> None:
    matrix = gram([torch.ones(3)])
    assert torch.equal(retain_normal(matrix), torch.ones(1, dtype=torch.float64))
    assert cosines(matrix).shape == conflicts(matrix).shape == (0,)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("index", [0, 2])
def test_what_is_not_finite_never_becomes_a_projection(value: float, index: int) -> None:
    gradients = torch.ones(3, 4)
    gradients[index, 1] = value
    matrix = gram(gradients)
    coefficients = retain_normal(matrix)
    assert coefficients.isnan().all()
    assert math.isnan(clip_coefficient(matrix, torch.ones(3, dtype=torch.float64), 1.0))


@given(matrices(fewest=1), st.floats(1e-3, 1e3))
def test_clip_coefficient_is_the_global_norm_clip(gradients: Tensor, max_norm: float) -> None:
    matrix = gram(gradients)
    weights = retain_normal(matrix)
    combined = torch.empty_like(gradients[0])
    factor = clip_coefficient(matrix, weights, max_norm)
    combine_(combined, gradients, weights * factor)
    assert 0 < factor <= 1
    # What cancels in the combination cancels only up to rounding in the quadratic form.
    slack = 1e-6 * float(gradients.norm()) * float(weights.abs().max())
    assert float(combined.norm()) <= max_norm * (1 + 1e-6) + slack
    if factor < 1:
        assert float(combined.norm()) >= max_norm * (1 - 1e-6) - slack


def test_a_vanishing_combination_is_not_clipped() -> None:
    matrix = torch.tensor([[1.0, 1.0], [1.0, 1.0 - 1e-16]], dtype=torch.float64)
    assert clip_coefficient(matrix, torch.tensor([1.0, -1.0]), 1.0) == 1.0
    below_zero = torch.tensor([[1.0, 1.0 + 1e-15], [1.0 + 1e-15, 1.0]], dtype=torch.float64)
    assert clip_coefficient(below_zero, torch.tensor([1.0, -1.0]), 1.0) == 1.0


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"gram: shape \(2, 3\), expected \[K, K\]"):
        retain_normal(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"gram: shape \(0, 0\)"):
        cosines(torch.ones(0, 0))
    with pytest.raises(ValueError, match=r"coefficients: shape \(3,\), expected \(2,\)"):
        clip_coefficient(torch.eye(2), torch.ones(3), 1.0)
    with pytest.raises(ValueError, match="max_norm: 0, expected a positive number"):
        clip_coefficient(torch.eye(2), torch.ones(2), 0)
