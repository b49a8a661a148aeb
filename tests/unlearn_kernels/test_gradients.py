"""gram and combine_ against float64, over backends, dtypes, odd sizes, lists, strides and numbers of gradients."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.device import DEVICE
from unlearn_kernels import axpby_, combine_, gram
from unlearn_kernels.reference import CHUNK

pytestmark = pytest.mark.usefixtures("backend")

Rounding = Callable[[torch.dtype, float], float]

DTYPES = [
    pytest.param(torch.float64, 1e-12, id="fp64"),
    pytest.param(torch.float32, 1e-6, id="fp32"),
    pytest.param(torch.bfloat16, 2**-8, id="bf16"),
    pytest.param(torch.float16, 2**-11, id="fp16"),
]
# Empty, one, odd, a whole chunk, one less and one more, several with a tail.
SIZES = [0, 1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]


def _gradients(count: int, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(count * 1000 + size)
    return [torch.randn(size, generator=generator, device=DEVICE).to(dtype) for _ in range(count)]


def _weights(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)


def _exact_gram(gradients: list[Tensor]) -> Tensor:
    matrix = torch.stack([gradient.double().reshape(-1) for gradient in gradients])
    return matrix @ matrix.T


def _assert_gram(result: Tensor, gradients: list[Tensor], backend: str) -> None:
    """Relative to |g_i| |g_j|; fused backends sum short runs in float32, see `gram`."""
    exact = _exact_gram(gradients)
    norms = exact.diagonal().sqrt()
    relative = (result - exact).abs() / (norms[:, None] * norms).clamp(min=1e-300)
    assert relative.max() <= (1e-12 if backend == "reference" else 1e-6) if len(exact) else True


def _exact_combination(gradients: list[Tensor], weights: Tensor) -> Tensor:
    return torch.einsum("k,k...->...", weights.to(DEVICE), torch.stack([gradient.double() for gradient in gradients]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "_rtol"), DTYPES)
def test_gram_is_exact_whatever_the_dtype(dtype: torch.dtype, _rtol: float, size: int, backend: str) -> None:
    gradients = _gradients(3, size, dtype)
    result = gram(gradients)
    assert result.dtype == torch.float64
    assert torch.equal(result, result.T)
    _assert_gram(result, gradients, backend)


@pytest.mark.parametrize("size", SIZES)
def test_two_float32_gradients_are_summed_in_float64(size: int, backend: str) -> None:
    """The everyday case, and the one whose sign decides whether anything is projected."""
    gradients = _gradients(2, size)
    rtol = 1e-6 if backend == "triton" else 1e-12
    torch.testing.assert_close(gram(gradients), _exact_gram(gradients), rtol=rtol, atol=1e-9 if size else 0)


@pytest.mark.parametrize("count", [*range(1, 10), 16, 31, 32])
@pytest.mark.parametrize(("dtype", "rtol"), DTYPES)
def test_any_number_of_gradients(count: int, dtype: torch.dtype, rtol: float, backend: str) -> None:
    gradients, weights = _gradients(count, 1037, dtype), _weights(count)
    _assert_gram(gram(gradients), gradients, backend)
    out = torch.empty(1037, dtype=dtype, device=DEVICE)
    combine_(out, gradients, weights)
    torch.testing.assert_close(out.double(), _exact_combination(gradients, weights), rtol=2 * rtol, atol=8 * rtol)


@pytest.mark.parametrize("count", [2, 3])
def test_gradients_of_different_dtypes(count: int, backend: str) -> None:
    dtypes = [torch.bfloat16, torch.float32, torch.float16]
    gradients = [gradient.to(dtype) for gradient, dtype in zip(_gradients(count, CHUNK + 3), dtypes, strict=False)]
    _assert_gram(gram(gradients), gradients, backend)
    out = torch.empty(CHUNK + 3, device=DEVICE)
    combine_(out, gradients, _weights(count))
    torch.testing.assert_close(out.double(), _exact_combination(gradients, _weights(count)), rtol=1e-5, atol=1e-5)


def test_axpby_is_the_case_of_two() -> None:
    x, y = _gradients(2, CHUNK + 5)
    expected = 0.25 * x.double() - 3 * y.double()
    axpby_(y, 0.25, x, -3.0)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_matrix_and_lists_give_the_bits_of_flat_gradients(backend: str) -> None:
    gradients = _gradients(4, 2 * CHUNK + 77)
    flat = gram(gradients)
    sizes = [5, 0, CHUNK, CHUNK + 1, 71]
    for same in (torch.stack(gradients), [gradient.split(sizes) for gradient in gradients]):
        if backend == "triton":  # whose order depends on the entries and their alignment
            _assert_gram(gram(same), gradients, backend)
        else:
            assert torch.equal(gram(same), flat)


@pytest.mark.parametrize(
    "shape", [(), (3, 5), (2, 0, 4), (1, CHUNK // 4, 7), (CHUNK + 3, 2), (2, 1, 2 * CHUNK)], ids=str
)
def test_strided_gradients(shape: tuple[int, ...], backend: str) -> None:
    """Non-contiguous tensors are taken in logical order; the others of the same entry may be contiguous."""
    plain = torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
    backwards = tuple(reversed(range(len(shape))))
    strided = torch.randn(shape[::-1], generator=torch.Generator(DEVICE).manual_seed(2), device=DEVICE).permute(
        backwards
    )
    stepped = torch.randn((*shape, 2), generator=torch.Generator(DEVICE).manual_seed(3), device=DEVICE)[..., 0]
    gradients = [plain, strided, stepped]
    _assert_gram(gram(gradients), gradients, backend)
    expected = _exact_combination(gradients, _weights(3))
    combine_(stepped, gradients, _weights(3))
    torch.testing.assert_close(stepped.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "empty",
    [[], [torch.empty(0, device=DEVICE)], [torch.empty(0, 3, device=DEVICE), torch.empty(2, 0, device=DEVICE)]],
    ids=["none", "one", "two"],
)
def test_a_rank_without_parameters(empty: list[Tensor]) -> None:
    assert torch.equal(gram([empty, empty]).cpu(), torch.zeros(2, 2, dtype=torch.float64))
    combine_(empty, [empty, empty], torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "rtol"), DTYPES)
def test_combine_rounds_once(dtype: torch.dtype, rtol: float, size: int, rounding: Rounding) -> None:
    gradients, weights = _gradients(4, size, dtype), _weights(4)
    out = torch.full((size,), torch.nan, dtype=dtype, device=DEVICE)
    combine_(out, gradients, weights)
    rtol = rounding(dtype, rtol)
    torch.testing.assert_close(out.double(), _exact_combination(gradients, weights), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("alias", [0, 1, 2])
def test_the_output_may_be_one_of_the_gradients(alias: int) -> None:
    gradients, weights = [list(s.split([9, CHUNK + 2])) for s in _gradients(3, CHUNK + 11)], _weights(3)
    copies = [[entry.clone() for entry in gradient] for gradient in gradients]
    expected = [torch.empty(9, device=DEVICE), torch.empty(CHUNK + 2, device=DEVICE)]
    combine_(expected, copies, weights)
    combine_(gradients[alias], gradients, weights)
    for k, gradient in enumerate(gradients):
        wanted = expected if k == alias else copies[k]
        assert all(torch.equal(a, b) for a, b in zip(gradient, wanted, strict=True))


def test_the_output_may_be_a_parameter() -> None:
    out = torch.nn.Parameter(torch.zeros(5, device=DEVICE))
    combine_(
        out, [torch.ones(5, device=DEVICE), torch.ones(5, device=DEVICE)], torch.tensor([1.0, 2.0], dtype=torch.float64)
    )
    assert torch.equal(out.detach(), torch.full((5,), 3.0, device=DEVICE))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("dtype", "_rtol"), DTYPES)
def test_what_is_not_finite_shows(value: float, dtype: torch.dtype, _rtol: float) -> None:
    gradients = _gradients(3, CHUNK + 9, dtype)
    gradients[1][CHUNK + 3] = value
    result = gram(gradients)
    assert not result[1].isfinite().any()
    assert result[[0, 0, 2], [0, 2, 2]].isfinite().all()
    out = torch.empty(CHUNK + 9, dtype=dtype, device=DEVICE)
    combine_(out, gradients, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    assert not out[CHUNK + 3].isfinite()
    two = torch.empty(CHUNK + 9, dtype=dtype, device=DEVICE)
    combine_(two, gradients[1:], torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert not two[CHUNK + 3].isfinite()


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("dtype", "_rtol"), DTYPES)
def test_the_bits_are_the_same_for_any_number_of_threads(dtype: torch.dtype, _rtol: float, count: int) -> None:
    gradients = _gradients(count, 5 * CHUNK + 13, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = torch.empty_like(gradients[0])
            combine_(out, gradients, _weights(count))
            results.append((gram(gradients), out))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, results[0][0]) and torch.equal(b, results[0][1]) for a, b in results)


PEAK = """
import re, sys, torch
from pathlib import Path
from unlearn_kernels import combine_, gram, preconditioned_gram, use_backend
use_backend(sys.argv[1]).__enter__()
size = 8_000_000
matrix = torch.ones(3, size, dtype=torch.bfloat16)
weights, moment = torch.ones(3, dtype=torch.float64), torch.ones(size)
def work(n):
    gram(matrix[:, :n])
    preconditioned_gram(matrix[:, :n], moment[:n], correction=0.5, eps=1e-8)
    combine_(matrix[2, :n], matrix[:, :n], weights)
def peak():  # kB of this process alone: ru_maxrss would start with that of the parent
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
work(200_000)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = peak()
work(size)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_extra_memory_is_bounded(backend: str) -> None:
    """Another copy of one gradient in bfloat16 would be 16 MB, in float32 32 MB."""
    command = [sys.executable, "-c", PEAK, backend]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    limit = {"native": 1_000}.get(backend, 8_000)  # kB
    assert int(run.stdout) < limit


@pytest.mark.parametrize("count", [2, 3])
def test_no_gradient_is_copied_on_a_gpu(count: int, backend: str) -> None:
    gradients, size = _gradients(count, 8_000_000, torch.bfloat16), 16_000_000  # bytes of one
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gram(gradients)
    combine_(gradients[-1], gradients, _weights(count))
    assert torch.cuda.max_memory_allocated() - before < size / 4, backend


@pytest.mark.parametrize("count", [2, 3])
def test_the_bits_are_the_same_every_time(count: int) -> None:
    gradients = _gradients(count, CHUNK + 5)
    assert torch.equal(gram(gradients), gram(gradients))


def test_arguments_are_checked() -> None:
    a, b = torch.ones(3, device=DEVICE), torch.ones(4, device=DEVICE)
    weights = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"gradients\[1\]\[0\]: shape \(4,\), in gradients\[0\] it is \(3,\)"):
        gram([a, b])
    with pytest.raises(ValueError, match=r"gradients\[1\]: 2 entries, gradients\[0\] has 1"):
        gram([[a], [a, a]])
    with pytest.raises(ValueError, match="at least one gradient"):
        gram([])
    with pytest.raises(ValueError, match=r"matrix \[K, N\]"):
        gram(a)
    with pytest.raises(ValueError, match=r"out\[0\]: shape \(4,\)"):
        combine_(b, [a, a], weights)
    with pytest.raises(ValueError, match=r"coefficients: shape \(2,\), expected \(3,\)"):
        combine_(a, [a, a, a], weights)
