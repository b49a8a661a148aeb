"""preconditioned_gram against float64, over backends, dtypes, odd sizes, lists, strides and numbers of gradients."""

import pytest
import torch
from torch import Tensor

from tests.device import DEVICE
from unlearn_kernels import gram, preconditioned_gram
from unlearn_kernels.reference import CHUNK

pytestmark = pytest.mark.usefixtures("backend")

CORRECTION, EPS = 0.3, 1e-8
DTYPES = [
    pytest.param(torch.float64, id="fp64"),
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16"),
]
# Empty, one, odd, a whole chunk, one less and one more, several with a tail.
SIZES = [0, 1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]


def gradients_of(count: int, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(count * 1000 + size)
    return [torch.randn(size, generator=generator, device=DEVICE).to(dtype) for _ in range(count)]


def moment_of(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw squares over many orders of magnitude, a few of them 0, as AdamW's state has."""
    v = torch.rand(size, generator=torch.Generator(DEVICE).manual_seed(size), device=DEVICE) ** 8
    v[::97] = 0
    return v.to(torch.float64 if dtype == torch.float64 else torch.float32)


def grams(gradients: object, moment: object, correction: float = CORRECTION, eps: float = EPS) -> tuple[Tensor, Tensor]:
    return preconditioned_gram(gradients, moment, correction=correction, eps=eps)  # pyright: ignore[reportArgumentType]


def assert_exact(gradients: list[Tensor], moment: Tensor, backend: str, both: tuple[Tensor, Tensor]) -> None:
    """Compare both matrices, relative to |g_i| |g_j| in their norm; fused backends have p in float32."""
    rows = torch.stack([gradient.double().reshape(-1) for gradient in gradients])
    p = 1 / ((moment.double().reshape(-1) / CORRECTION).sqrt() + EPS)
    for result, left in zip(both, (rows, p * rows), strict=True):
        exact = left @ rows.T
        assert result.dtype == torch.float64
        assert torch.equal(result, result.T)
        norms = exact.diagonal().sqrt()
        relative = (result - exact).abs() / (norms[:, None] * norms).clamp(min=1e-300)
        assert relative.max() <= (1e-12 if backend == "reference" else 1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_matrices_are_exact_whatever_the_dtype(dtype: torch.dtype, size: int, backend: str) -> None:
    for count in (2, 3):
        gradients, moment = gradients_of(count, size, dtype), moment_of(size, dtype)
        assert_exact(gradients, moment, backend, grams(gradients, moment))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 16, 17, 32, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_gradients(count: int, dtype: torch.dtype, backend: str) -> None:
    gradients, moment = gradients_of(count, 1037, dtype), moment_of(1037, dtype)
    assert_exact(gradients, moment, backend, grams(gradients, moment))


@pytest.mark.parametrize("count", [2, 3])
def test_gradients_of_different_dtypes(count: int, backend: str) -> None:
    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    gradients = [g.to(dtype) for g, dtype in zip(gradients_of(count, CHUNK + 3), dtypes, strict=False)]
    moment = moment_of(CHUNK + 3)
    assert_exact(gradients, moment, backend, grams(gradients, moment))


def test_the_plain_matrix_is_that_of_gram(backend: str) -> None:
    """A backend may add the two matrices in another order than `gram` does, so they agree to within rounding."""
    for count in (2, 5):
        gradients = gradients_of(count, 2 * CHUNK + 7)
        plain, _ = grams(gradients, moment_of(2 * CHUNK + 7))
        torch.testing.assert_close(plain, gram(gradients), rtol=1e-6, atol=1e-2)


def test_a_moment_of_equal_numbers_scales_the_plain_matrix(backend: str) -> None:
    gradients = gradients_of(3, 5000)
    plain, weighted = grams(gradients, torch.full((5000,), 4.0, device=DEVICE), correction=1.0, eps=0.5)
    torch.testing.assert_close(weighted, plain / 2.5, rtol=1e-6, atol=1e-3)


def test_a_matrix_and_lists_give_the_bits_of_flat_gradients(backend: str) -> None:
    gradients, moment = gradients_of(4, 2 * CHUNK + 77), moment_of(2 * CHUNK + 77)
    flat = grams(gradients, moment)
    sizes = [5, 0, CHUNK, CHUNK + 1, 71]
    cases = (torch.stack(gradients), moment), ([g.split(sizes) for g in gradients], moment.split(sizes))
    for same, its_moment in cases:
        both = grams(same, its_moment)
        if backend == "triton":  # whose order depends on the entries and their alignment
            assert_exact(gradients, moment, backend, both)
        else:
            assert all(torch.equal(a, b) for a, b in zip(both, flat, strict=True))


@pytest.mark.parametrize("shape", [(), (3, 5), (2, 0, 4), (CHUNK + 3, 2)], ids=str)
def test_strided_tensors(shape: tuple[int, ...], backend: str) -> None:
    """Non-contiguous tensors are taken in logical order, the moment as well."""
    gradients = [
        torch.randn((*shape, 2), generator=torch.Generator(DEVICE).manual_seed(k), device=DEVICE)[..., 0]
        for k in range(3)
    ]
    moment = torch.rand((*shape, 2), generator=torch.Generator(DEVICE).manual_seed(9), device=DEVICE)[..., 1]
    assert_exact(gradients, moment, backend, grams(gradients, moment))


@pytest.mark.parametrize("empty", [[], [torch.empty(0, device=DEVICE)]], ids=["none", "one"])
def test_a_rank_without_parameters(empty: list[Tensor]) -> None:
    for matrix in grams([empty, empty], empty):
        assert torch.equal(matrix.cpu(), torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_shows(value: float, dtype: torch.dtype) -> None:
    for count in (2, 3):
        gradients, moment = gradients_of(count, CHUNK + 9, dtype), moment_of(CHUNK + 9, dtype)
        gradients[1][CHUNK + 3] = value
        for matrix in grams(gradients, moment):
            assert not matrix[1].isfinite().any()
            assert matrix[0, 0].isfinite()
        fine = gradients_of(count, CHUNK + 9, dtype)
        moment[CHUNK + 3] = torch.nan
        plain, weighted = grams(fine, moment)
        assert plain.isfinite().all()
        assert not weighted.isfinite().any()


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_are_the_same_for_any_number_of_threads(dtype: torch.dtype, count: int) -> None:
    gradients, moment = gradients_of(count, 5 * CHUNK + 13, dtype), moment_of(5 * CHUNK + 13, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.stack(grams(gradients, moment)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_arguments_are_checked() -> None:
    a, b = torch.ones(3, device=DEVICE), torch.ones(4, device=DEVICE)
    with pytest.raises(ValueError, match=r"second_moment\[0\]: shape \(4,\), in gradients\[0\] it is \(3,\)"):
        grams([a, a], b)
    with pytest.raises(ValueError, match=r"second_moment: 2 entries, gradients\[0\] has 1"):
        grams([[a], [a]], [a, a])
    with pytest.raises(ValueError, match=r"second_moment\[0\]: dtype torch.bfloat16"):
        grams([a, a], a.bfloat16())
    with pytest.raises(ValueError, match="correction: 0"):
        grams([a, a], a, correction=0.0)
    with pytest.raises(ValueError, match="eps: 0"):
        grams([a, a], a, eps=0.0)
