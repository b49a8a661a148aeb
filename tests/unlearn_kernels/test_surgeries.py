"""Every surgery by its name, TorchJD's under our conventions."""

import math

import pytest
import torch
from torch import Tensor

from unlearn_kernels import SURGERIES, combine_, gram, retain_normal, surgery

SUMS = ("none", "pcgrad", "upgrad", "dualproj")


def _gradients(count: int, *, aligned: bool, seed: int = 0) -> Tensor:
    """float64 [K, 400]; `aligned`: every inner product is positive."""
    rows = torch.randn(count, 400, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows + 3 if aligned else rows


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_without_conflict_it_is_the_sum_of_retain_normal(name: str, count: int) -> None:
    matrix = gram(_gradients(count, aligned=True))
    torch.testing.assert_close(surgery(name, matrix, 0.3), retain_normal(matrix, 0.3), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "mgda"])
@pytest.mark.parametrize("count", [2, 5, 32])
def test_nothing_is_left_against_any_gradient(name: str, count: int) -> None:
    gradients = _gradients(count, aligned=False)
    out = torch.empty_like(gradients[0])
    combine_(out, gradients, surgery(name, gram(gradients)))
    assert (gradients @ out).min() > -0.02 * float(gradients.norm(dim=1).max() * out.norm())


@pytest.mark.parametrize("name", SURGERIES)
def test_two_in_conflict(name: str) -> None:
    gradients = torch.tensor([[-1.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    coefficients = surgery(name, gram(gradients))
    assert coefficients.dtype == torch.float64
    if name != "none":
        assert float((coefficients @ gradients) @ gradients[1]) >= -1e-3
    if name == "pcgrad":
        # Each is projected off the other: (-1, 1) -> (0, 1) and (2, 0) -> (1, 1).
        torch.testing.assert_close(coefficients @ gradients, torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_ranks_agree_on_the_order_of_pcgrad_and_keep_their_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = gram(_gradients(6, aligned=False))
    monkeypatch.setattr("torch.cuda.manual_seed_all", lambda seed: pytest.fail(f"the GPUs are seeded with {seed}"))
    torch.default_generator.manual_seed(1)
    first, state = surgery("pcgrad", matrix, seed=7), torch.get_rng_state()
    torch.default_generator.manual_seed(2)
    assert torch.equal(surgery("pcgrad", matrix, seed=7), first)
    assert not torch.equal(surgery("pcgrad", matrix, seed=8), first)
    torch.default_generator.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", SURGERIES)
def test_what_is_not_finite_gives_nan(name: str) -> None:
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[1, 1] = math.inf
    assert surgery(name, matrix).isnan().all()


@pytest.mark.parametrize("name", SURGERIES)
def test_zero_gradients_are_no_error(name: str) -> None:
    gradients = torch.zeros(3, 5, dtype=torch.float64)
    assert surgery(name, gram(gradients)).isfinite().all()


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=f"'gradvac', expected one of {', '.join(SURGERIES)}"):
        surgery("gradvac", torch.eye(2))
