"""The operators as torch sees them: autograd, fake tensors and torch.compile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.device import DEVICE
from unlearn_kernels import (
    axpby_,
    combine_,
    gram,
    noise_and_target,
    preconditioned_gram,
    regression_loss,
    retain_normal,
    surgery,
    weighted_loss,
)

pytestmark = pytest.mark.usefixtures("backend")

OPERATORS = torch.ops.unlearn_kernels


def _samples(count: int, shape: tuple[int, ...] = (2, 3, 4)) -> list[Tensor]:
    return list(torch.randn(count, *shape, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE).unbind(0))


@pytest.mark.parametrize("with_target", [True, False])
def test_opcheck_noise_and_target(with_target: bool) -> None:
    arguments = (*_samples(3), torch.rand(2, 2, device=DEVICE), torch.rand(2, 3, device=DEVICE), with_target)
    torch.library.opcheck(OPERATORS.noise_and_target.default, arguments)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("terms", [1, 2, 3])
def test_opcheck_weighted_loss(terms: int, masked: bool) -> None:
    pred, *others = _samples(1 + terms)
    mask = torch.rand(2, 4, device=DEVICE) if masked else None
    arguments = (pred, others, torch.rand(2, terms, device=DEVICE), torch.rand(2, device=DEVICE), mask, True)
    torch.library.opcheck(OPERATORS.weighted_loss.default, arguments)


def test_opcheck_gram_and_combine() -> None:
    tensors = _samples(4)
    torch.library.opcheck(OPERATORS.gram.default, (tensors, 2))
    torch.library.opcheck(
        OPERATORS.preconditioned_gram.default, (tensors, [tensor.square() for tensor in tensors[:2]], 0.5, 1e-8)
    )
    coefficients = torch.tensor([0.5, 2.0], dtype=torch.float64)
    torch.library.opcheck(OPERATORS.combine_.default, (_samples(2), tensors, coefficients))


def _loss(*tensors: Tensor) -> Tensor:
    pred, eps, x_f, x_s, mask = tensors
    return weighted_loss(pred, eps, x_f, x_s, torch.ones(2, 3, device=DEVICE), torch.ones(2, device=DEVICE), mask)


def _noise(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    x_f, x_s, eps = tensors[:3]
    return noise_and_target(x_f, x_s, eps, torch.ones(2, 2, device=DEVICE), torch.ones(2, 3, device=DEVICE))


def _surgery(*tensors: Tensor) -> Tensor:
    out = tensors[1].clone()
    combine_(out, tensors[:2], torch.tensor([0.25, 1.0], dtype=torch.float64))
    plain, weighted = preconditioned_gram(tensors[:2], tensors[2].square(), correction=0.5, eps=1e-8)
    return torch.cat([gram([out, *tensors[:2]]).flatten(), plain.flatten(), weighted.flatten()])


@pytest.mark.parametrize("function", [_loss, _noise, _surgery])
def test_compiles_without_a_break_in_the_graph(function: Callable[..., Tensor | tuple[Tensor, Tensor]]) -> None:
    tensors = _samples(5)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), function(*tensors))


def test_compiled_gradient_is_the_eager_one() -> None:
    torch._dynamo.reset()
    gradients = []
    for function in (_loss, torch.compile(_loss, fullgraph=True, backend="aot_eager")):
        pred, *others = _samples(5)
        pred.requires_grad_()
        (2 * function(pred, *others)).backward()
        assert pred.grad is not None
        gradients.append(pred.grad)
    torch.testing.assert_close(*gradients)


def test_meta_tensors_have_shapes_and_dtypes() -> None:
    pred, eps, x_f, x_s = (tensor.to("meta", torch.bfloat16) for tensor in _samples(4))
    table = torch.ones(2, 3, device="meta")
    loss = weighted_loss(pred.requires_grad_(), eps, x_f, x_s, table, torch.ones(2, device="meta"))
    loss.backward()
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert pred.grad is not None
    assert (pred.grad.dtype, pred.grad.shape) == (torch.bfloat16, pred.shape)
    assert gram([eps, x_f]).shape == (2, 2)


def test_differentiating_twice_raises_and_never_gives_zero() -> None:
    pred, eps, x_f, x_s = _samples(4)
    loss = weighted_loss(
        pred.requires_grad_(), eps, x_f, x_s, torch.ones(2, 3, device=DEVICE), torch.ones(2, device=DEVICE)
    )
    with pytest.raises(RuntimeError, match="differentiating its gradient again is not supported"):
        torch.autograd.grad(loss**2, pred, create_graph=True)


def test_what_is_written_in_place_is_no_longer_what_autograd_saved() -> None:
    x, w = torch.ones(4, requires_grad=True, device=DEVICE), torch.ones(4, device=DEVICE)
    y = (x * w).sum()
    combine_(w, [w, w], torch.tensor([2.0, 2.0], dtype=torch.float64))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_tensors_of_several_devices_are_refused() -> None:
    here, there = torch.ones(3, device=DEVICE), torch.ones(3, device="meta")
    with pytest.raises(ValueError, match=rf"gradients\[1\]\[0\]: on meta, gradients\[0\]\[0\] is on {here.device}"):
        gram([here, there])
    with pytest.raises(ValueError, match=r"out\[0\]: on meta"):
        combine_(there, [here], torch.ones(1, dtype=torch.float64))
    with pytest.raises(ValueError, match=rf"terms\[0\]: on meta, pred is on {here.device}"):
        regression_loss(here, [there], torch.ones(3, 1, device=DEVICE), torch.ones(3, device=DEVICE))
    with pytest.raises(ValueError, match=r"out\[0\]: dtype torch.int64"):
        combine_(here.long(), [here], torch.ones(1, dtype=torch.float64))


def test_coefficients_stay_on_the_host_whatever_the_default_device() -> None:
    matrix, x, y = torch.eye(2, dtype=torch.float64), torch.ones(3, device=DEVICE), torch.ones(3, device=DEVICE)
    with torch.device("meta"):
        assert retain_normal(matrix).device.type == "cpu"
        assert surgery("pcgrad", matrix).device.type == "cpu"
        axpby_(y, 2.0, x, 1.0)
    assert torch.equal(y, torch.full((3,), 3.0, device=DEVICE))


@pytest.mark.parametrize("wanted", [True, False])
def test_no_gradient_is_computed_where_none_is_wanted(wanted: bool) -> None:
    pred, term = _samples(2)
    with torch.set_grad_enabled(wanted), _Calls() as calls:
        regression_loss(pred.requires_grad_(), [term], torch.ones(2, 1, device=DEVICE), torch.ones(2, device=DEVICE))
    assert [arguments[-1] for name, arguments in calls.seen if "weighted_loss" in name] == [wanted]


class _Calls(TorchDispatchMode):
    """Records the operators that are called inside, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[object, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((str(func), args))
        return func(*args, **(kwargs or {}))
