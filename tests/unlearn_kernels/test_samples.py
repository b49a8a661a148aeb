"""noise_and_target and weighted_loss against float64, and the gradient against autograd of the naive expression."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.device import DEVICE
from unlearn_kernels import noise_and_target, regression_loss, weighted_loss

pytestmark = pytest.mark.usefixtures("backend")

Rounding = Callable[[torch.dtype, float], float]

# (dtype of the tensors, relative tolerance of what is rounded to it, relative tolerance of the float32 loss)
DTYPES = [
    pytest.param(torch.float64, 1e-12, 1e-12, id="fp64"),
    pytest.param(torch.float32, 2e-6, 1e-6, id="fp32"),
    pytest.param(torch.bfloat16, 2**-8, 1e-6, id="bf16"),
    pytest.param(torch.float16, 2**-11, 1e-6, id="fp16"),
]
SHAPES = [(1, 1), (3,), (2, 7), (4, 1, 24, 24), (3, 16, 5, 9), (5, 2, 3, 4, 3), (2, 2, 187, 191)]


class Samples(NamedTuple):
    pred: Tensor
    eps: Tensor
    x_f: Tensor
    x_s: Tensor


def _samples(shape: tuple[int, ...], dtype: torch.dtype) -> Samples:
    generator = torch.Generator(DEVICE).manual_seed(0)
    return Samples(
        *[torch.randn(shape, generator=generator, dtype=torch.float64, device=DEVICE).to(dtype) for _ in range(4)]
    )


def _table(batch: int, columns: int) -> Tensor:
    return torch.randn(batch, columns, generator=torch.Generator(DEVICE).manual_seed(7), device=DEVICE)


def _column(table: Tensor, index: int, ndim: int) -> Tensor:
    return table.double()[:, index].reshape(-1, *[1] * (ndim - 1))


def _naive_target(eps: Tensor, x_f: Tensor, x_s: Tensor, coefficients: Tensor) -> Tensor:
    c_eps, c_f, c_s = (_column(coefficients, i, eps.ndim) for i in range(3))
    return c_eps * eps.double() + c_f * x_f.double() + c_s * x_s.double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "rtol", "_loss_rtol"), DTYPES)
def test_noise_and_target_is_the_stated_sum(
    shape: tuple[int, ...], dtype: torch.dtype, rtol: float, _loss_rtol: float, rounding: Rounding
) -> None:
    rtol = rounding(dtype, rtol)
    _, eps, x_f, x_s = _samples(shape, dtype)
    path, coefficients = _table(shape[0], 2), _table(shape[0], 3)
    x_t, target = noise_and_target(x_f, x_s, eps, path, coefficients)
    expected = _column(path, 0, x_f.ndim) * x_f.double() + _column(path, 1, x_f.ndim) * eps.double()
    assert x_t.dtype == target.dtype == dtype
    torch.testing.assert_close(x_t.double(), expected, rtol=rtol, atol=rtol)
    torch.testing.assert_close(target.double(), _naive_target(eps, x_f, x_s, coefficients), rtol=rtol, atol=rtol)


def test_flow_target_points_from_the_target_image_to_the_surrogate() -> None:
    """SD3: x_t = (1 - s) x_f + s eps and target = (x_t - x_s) / s, here by the coefficients (1, 1/s - 1, -1/s)."""
    _, eps, x_f, x_s = _samples((3, 4, 4), torch.float32)
    sigma = torch.tensor([0.1, 0.5, 0.9], device=DEVICE)
    path = torch.stack([1 - sigma, sigma], 1)
    coefficients = torch.stack([torch.ones(3, device=DEVICE), 1 / sigma - 1, -1 / sigma], 1)
    x_t, target = noise_and_target(x_f, x_s, eps, path, coefficients)
    torch.testing.assert_close(target, (x_t - x_s) / sigma[:, None, None], rtol=1e-5, atol=1e-5)


def test_the_target_is_optional() -> None:
    _, eps, x_f, x_s = _samples((3, 4, 4), torch.float32)
    x_t, target = noise_and_target(x_f, torch.full_like(x_s, torch.nan), eps, _table(3, 2), _table(3, 3))
    alone, nothing = noise_and_target(x_f, x_s, eps, _table(3, 2), _table(3, 3), with_target=False)
    assert nothing is None
    assert target.isnan().all()
    assert torch.equal(x_t, alone)


def test_an_empty_batch_stays_one() -> None:
    _, eps, x_f, x_s = _samples((0, 4), torch.float32)
    x_t, target = noise_and_target(x_f, x_s, eps, _table(0, 2), _table(0, 3))
    assert x_t.shape == target.shape == (0, 4)


@pytest.mark.parametrize("masked", [None, "bool", "soft"])
@pytest.mark.parametrize("shape", [(2, 7), (4, 1, 24, 24), (3, 16, 5, 9), (2, 2, 187, 191)], ids=str)
@pytest.mark.parametrize(("dtype", "rtol", "loss_rtol"), DTYPES)
def test_loss_and_gradient(
    shape: tuple[int, ...], dtype: torch.dtype, rtol: float, loss_rtol: float, masked: str | None
) -> None:
    pred, eps, x_f, x_s = _samples(shape, dtype)
    coefficients, weight = _table(shape[0], 3), _table(shape[0], 1)[:, 0].abs()
    soft = torch.rand((shape[0], 1, *shape[2:]), generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
    mask = {None: None, "bool": soft > 0.4, "soft": soft}[masked]

    pred.requires_grad_()
    loss = weighted_loss(pred, eps, x_f, x_s, coefficients, weight, mask)
    (3 * loss).backward()

    exact = pred.detach().double().requires_grad_()
    squares = (exact - _naive_target(eps, x_f, x_s, coefficients)) ** 2
    keep = torch.ones_like(squares) if mask is None else mask.double().expand_as(squares)
    expected = (weight.double() * (keep * squares).flatten(1).sum(1) / keep.flatten(1).sum(1).clamp(min=1e-9)).mean()
    (3 * expected).backward()

    assert loss.ndim == 0
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=loss_rtol, atol=0)
    assert pred.grad is not None
    assert exact.grad is not None
    assert pred.grad.dtype == dtype
    # float16 also loses what falls below its smallest normal number
    torch.testing.assert_close(pred.grad.double(), exact.grad, rtol=4 * rtol, atol=1e-7)


@pytest.mark.parametrize(
    "shape", [(), (5,), (1, 5), (4, 1), (3, 4, 5), (1, 3, 1, 1), (2, 1, 4, 5), (2, 3, 4, 1), (2, 3, 1, 5)], ids=str
)
def test_whatever_broadcasts_is_a_mask(shape: tuple[int, ...]) -> None:
    pred, eps, x_f, x_s = _samples((2, 3, 4, 5), torch.float32)
    mask = torch.rand(shape, generator=torch.Generator(DEVICE).manual_seed(4), device=DEVICE) + 0.1
    spread = mask.expand(2, 3, 4, 5).clone()
    arguments = (eps, x_f, x_s, _table(2, 3), torch.tensor([1.0, 0.3], device=DEVICE))
    torch.testing.assert_close(weighted_loss(pred, *arguments, mask), weighted_loss(pred, *arguments, spread))


@pytest.mark.parametrize("pred_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pred_and_latents_of_different_dtypes(pred_dtype: torch.dtype) -> None:
    """A bfloat16 network over float32 latents: the target is not rounded to the network's dtype."""
    pred, eps, x_f, x_s = _samples((3, 4, 31), torch.float32)
    pred = pred.to(pred_dtype).requires_grad_()
    loss = weighted_loss(pred, eps, x_f.bfloat16(), x_s, _table(3, 3), torch.ones(3, device=DEVICE))
    loss.backward()
    exact = pred.detach().double() - _naive_target(eps, x_f.bfloat16(), x_s, _table(3, 3))
    torch.testing.assert_close(loss.detach().double(), exact.square().mean(), rtol=1e-6, atol=0)
    assert pred.grad is not None
    torch.testing.assert_close(pred.grad.double(), 2 * exact / exact.numel(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_a_loss_scale_saves_small_float16_gradients(scale: float) -> None:
    """Most of these would be 0 if they were rounded before they are scaled."""
    pred, eps, x_f, x_s = (0.1 * tensor for tensor in _samples((8, 16, 32, 32), torch.float16))
    pred.requires_grad_()
    (scale * weighted_loss(pred, eps, x_f, x_s, _table(8, 3), torch.ones(8, device=DEVICE))).backward()
    exact = 2 * (pred.detach().double() - _naive_target(eps, x_f, x_s, _table(8, 3))) / pred.numel() * scale
    assert pred.grad is not None
    assert pred.grad.dtype == torch.float16
    torch.testing.assert_close(pred.grad.double(), exact, rtol=2**-10, atol=2**-24)


def test_no_nan_becomes_a_number() -> None:
    """0x7fffffff is the NaN that some GPUs make: rounding to bfloat16 by bits alone would carry it into the sign."""
    pred, eps, x_f, x_s = _samples((2, 8, 8), torch.bfloat16)
    weight = torch.tensor([0x7FFFFFFF, 0x3F800000], dtype=torch.int32, device=DEVICE).view(torch.float32)
    pred.requires_grad_()
    loss = weighted_loss(pred, eps, x_f, x_s, _table(2, 3), weight)
    loss.backward()
    assert loss.isnan()
    assert pred.grad is not None
    assert pred.grad[0].isnan().all()
    assert pred.grad[1].isfinite().all()


def test_two_tensors_say_what_three_do() -> None:
    """(x_t - x_s) / sigma: the same target by the coefficients (1 / sigma, -1 / sigma) of (x_t, x_s)."""
    pred, eps, x_f, x_s = _samples((3, 4, 31), torch.float32)
    sigma = torch.tensor([0.2, 0.5, 0.9], device=DEVICE)
    three = torch.stack([torch.ones(3, device=DEVICE), 1 / sigma - 1, -1 / sigma], 1)
    x_t, _ = noise_and_target(x_f, x_s, eps, torch.stack([1 - sigma, sigma], 1), three)
    two = torch.stack([1 / sigma, -1 / sigma], 1)
    losses = [
        regression_loss(pred, (x_t, x_s), two, torch.ones(3, device=DEVICE)),
        weighted_loss(pred, eps, x_f, x_s, three, torch.ones(3, device=DEVICE)),
    ]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


def test_one_tensor_is_a_plain_distance() -> None:
    pred, teacher, *_ = _samples((3, 4, 31), torch.float32)
    loss = regression_loss(pred, [teacher], torch.ones(3, 1, device=DEVICE), torch.ones(3, device=DEVICE))
    torch.testing.assert_close(loss, (pred - teacher).square().mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dtype", "rtol", "loss_rtol"), DTYPES)
def test_sigma_at_its_clamp(dtype: torch.dtype, rtol: float, loss_rtol: float) -> None:
    """Coefficients of 1 / sigma = 1e4 cancel down to a difference of images; nothing overflows or loses the rest."""
    pred, eps, x_f, x_s = _samples((2, 3, 50), dtype)
    inverse = 1e4 if dtype != torch.float16 else 100.0
    coefficients = torch.tensor([[1.0, inverse - 1, -inverse]], device=DEVICE).expand(2, 3)
    weight = torch.tensor([1 / inverse**2, 0.5 / inverse**2], device=DEVICE)
    pred.requires_grad_()
    loss = weighted_loss(pred, eps, x_f, x_s, coefficients, weight)
    loss.backward()
    difference = pred.detach().double() - _naive_target(eps, x_f, x_s, coefficients)
    expected = (weight.double() * difference.square().flatten(1).mean(1)).mean()
    torch.testing.assert_close(loss.detach().double(), expected, rtol=10 * loss_rtol, atol=0)
    assert pred.grad is not None
    assert pred.grad.isfinite().all()


@pytest.mark.parametrize("dim", [1, 2])
def test_strided_samples(dim: int) -> None:
    plain = _samples((2, 6, 10), torch.float32)
    strided = Samples(*[x.transpose(1, 2).contiguous().transpose(1, 2) if dim == 1 else x for x in plain])
    strided = Samples(*[torch.stack([x, x], -1)[..., 0] if dim == 2 else x for x in strided])
    assert not strided.pred.is_contiguous()
    arguments = (_table(2, 3), torch.ones(2, device=DEVICE))
    assert torch.equal(weighted_loss(*plain, *arguments), weighted_loss(*strided, *arguments))
    tables = (_table(2, 2), _table(2, 3))
    plain_x, _ = noise_and_target(plain.x_f, plain.x_s, plain.eps, *tables)
    strided_x, _ = noise_and_target(strided.x_f, strided.x_s, strided.eps, *tables)
    assert torch.equal(plain_x, strided_x)


def test_the_loss_has_the_same_bits_for_any_number_of_threads() -> None:
    samples = _samples((3, 2, 190, 190), torch.float32)
    before = torch.get_num_threads()
    losses = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            losses.append(weighted_loss(*samples, _table(3, 3), torch.ones(3, device=DEVICE)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


def test_only_pred_gets_a_gradient() -> None:
    pred, eps, x_f, x_s = (tensor.requires_grad_() for tensor in _samples((2, 5), torch.float32))
    coefficients, weight = _table(2, 3).requires_grad_(), torch.ones(2, requires_grad=True, device=DEVICE)
    weighted_loss(pred, eps, x_f, x_s, coefficients, weight).backward()
    assert pred.grad is not None
    assert all(tensor.grad is None for tensor in (eps, x_f, x_s, coefficients, weight))


def test_the_loss_is_a_mean_over_the_batch() -> None:
    """Two micro-batches, averaged, are one batch: gradient accumulation changes nothing."""
    tensors = _samples((4, 3, 5), torch.float32)
    coefficients, weight = _table(4, 3), torch.tensor([0.5, 1, 2, 0], device=DEVICE)
    whole = weighted_loss(*tensors, coefficients, weight)
    first, second = (
        weighted_loss(*Samples(*[tensor[part] for tensor in tensors]), coefficients[part], weight[part])
        for part in (slice(0, 2), slice(2, 4))
    )
    torch.testing.assert_close(whole, (first + second) / 2, rtol=1e-6, atol=0)


def test_what_is_masked_out_may_be_nan_and_an_empty_mask_adds_nothing() -> None:
    pred, eps, x_f, x_s = _samples((2, 1, 4, 4), torch.float32)
    mask = torch.zeros(2, 1, 4, 4, dtype=torch.bool, device=DEVICE)
    mask[0, :, :2] = True
    pred[0, :, 2:] = torch.nan
    pred.requires_grad_()
    loss = weighted_loss(pred, eps, x_f, x_s, _table(2, 3), torch.ones(2, device=DEVICE), mask)
    loss.backward()
    kept = Samples(*[tensor[:1, :, :2].detach() for tensor in (pred, eps, x_f, x_s)])
    alone = weighted_loss(*kept, _table(2, 3)[:1], torch.ones(1, device=DEVICE))
    torch.testing.assert_close(loss.detach(), alone / 2)
    assert pred.grad is not None
    assert torch.equal(pred.grad[1], torch.zeros(1, 4, 4, device=DEVICE))
    assert pred.grad.isfinite().all()


def test_nan_is_not_hidden() -> None:
    pred, eps, x_f, x_s = _samples((2, 5), torch.float32)
    pred[1, 3] = torch.nan
    assert weighted_loss(pred, eps, x_f, x_s, _table(2, 3), torch.ones(2, device=DEVICE)).isnan()


def test_arguments_are_checked() -> None:
    pred, eps, x_f, x_s = _samples((2, 5), torch.float32)
    table, weight = _table(2, 3), torch.ones(2, device=DEVICE)
    with pytest.raises(ValueError, match=r"x_s: shape \(2, 4\)"):
        noise_and_target(x_f, x_s[:, :4], eps, _table(2, 2), table)
    with pytest.raises(ValueError, match=r"path: shape \(2, 3\), expected \(2, 2\)"):
        noise_and_target(x_f, x_s, eps, table, table)
    with pytest.raises(ValueError, match=r"coefficients: shape \(1, 3\)"):
        weighted_loss(pred, eps, x_f, x_s, table[:1], weight)
    with pytest.raises(ValueError, match=r"weight: shape \(2, 1\)"):
        weighted_loss(pred, eps, x_f, x_s, table, weight[:, None])
    with pytest.raises(ValueError, match=r"mask: shape \(3, 5\)"):
        weighted_loss(pred, eps, x_f, x_s, table, weight, torch.ones(3, 5, device=DEVICE))
    with pytest.raises(ValueError, match="no element to average over"):
        weighted_loss(pred[:0], eps[:0], x_f[:0], x_s[:0], table[:0], weight[:0])
    with pytest.raises(ValueError, match=r"eps: dtype torch\.int64"):
        weighted_loss(pred, eps.long(), x_f, x_s, table, weight)
    with pytest.raises(ValueError, match="terms: 4 tensors, expected 1 to 3"):
        regression_loss(pred, [eps, x_f, x_s, eps], torch.ones(2, 4, device=DEVICE), weight)
    with pytest.raises(ValueError, match=r"terms\[1\]: shape \(2, 4\)"):
        regression_loss(pred, [eps, x_f[:, :4]], torch.ones(2, 2, device=DEVICE), weight)
