"""The public operations: arguments are checked and laid out here, and a backend does the work.

Each is a `torch.library` operator, so it works with autograd, `torch.compile(fullgraph=True)` and fake tensors. Shapes:
B batch, K gradients (the last is the retain gradient), N elements of a gradient.
"""

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias, cast, overload

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from unlearn_kernels.backends import backend_for, gradient_dtype

Gradient: TypeAlias = Tensor | Sequence[Tensor]
"""One gradient, or a rank's shard of it: a tensor of any shape, or a list of tensors. May be empty; strided tensors are
copied."""
Gradients: TypeAlias = Tensor | Sequence[Gradient]
"""K gradients with the same shapes entry by entry, or one [K, N] matrix whose rows are the gradients."""

MOST_TERMS = 3
SHORTEST_PLANE = 512
"""The fewest elements of a mask that may repeat along a sample. Kernels take one repeat at a time, so shorter masks are
written out."""
_OPERATORS = torch.ops.unlearn_kernels


@overload
def noise_and_target(
    x_f: Tensor, x_s: Tensor, eps: Tensor, path: Tensor, coefficients: Tensor, *, with_target: Literal[True] = True
) -> tuple[Tensor, Tensor]: ...
@overload
def noise_and_target(
    x_f: Tensor, x_s: Tensor, eps: Tensor, path: Tensor, coefficients: Tensor, *, with_target: Literal[False]
) -> tuple[Tensor, None]: ...
def noise_and_target(
    x_f: Tensor, x_s: Tensor, eps: Tensor, path: Tensor, coefficients: Tensor, *, with_target: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Compute the model input `x_t = a x_f + b eps` and the target `c_eps eps + c_f x_f + c_s x_s`.

    x_f, x_s, eps: floating [B, ...], the same shape. path: [B, 2], columns (a, b). coefficients: [B, 3], columns
    (c_eps, c_f, c_s). Computed in float32 (float64 if a tensor is), both results in the dtype of `x_f`; each input is
    read once. Without `with_target` the target is None and x_s is not read. Not differentiable.
    Raises ValueError when the shapes do not agree.
    """
    _check_samples(x_f=x_f, x_s=x_s, eps=eps)
    _check_rows(len(x_f), 2, path=path)
    _check_rows(len(x_f), 3, coefficients=coefficients)
    x_t, *target = _OPERATORS.noise_and_target.default(
        *(tensor.detach().contiguous() for tensor in (x_f, x_s, eps)),
        *(_table(table, x_f) for table in (path, coefficients)),
        with_target,
    )
    return x_t, target[0] if target else None


def weighted_loss(
    pred: Tensor,
    eps: Tensor,
    x_f: Tensor,
    x_s: Tensor,
    coefficients: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute `regression_loss` for the target `c_eps eps + c_f x_f + c_s x_s`, the three-tensor form.

    pred, eps, x_f, x_s: floating [B, ...]. coefficients: [B, 3]. weight: [B]. The two-tensor form, which reads one
    tensor less and sees x_t as it was rounded for the model, is `regression_loss(pred, (x_t, x_s), ...)`.
    """
    _check_samples(pred=pred, eps=eps, x_f=x_f, x_s=x_s)
    return _loss(pred, (eps, x_f, x_s), coefficients, weight, mask)


def regression_loss(
    pred: Tensor,
    terms: Sequence[Tensor],
    coefficients: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute `mean_i weight_i mean_j (pred_ij - target_ij)^2`, where `target_i = sum_n coefficients_in terms[n]_i`.

    pred and 1 to 3 terms: floating [B, ...], the same shape. coefficients: [B, len(terms)]. weight: [B]. mask: bool or
    floating, [B, ...] broadcastable to pred, not negative; the inner mean is then over the masked elements, and a
    sample whose mask is empty adds 0. The target is never rounded. Computed and returned in float32 (float64 if a
    tensor is): short runs are summed in float32, and their sums in float64. Differentiable once, in `pred` only; loss
    and gradient take one sweep. Raises ValueError when the shapes do not agree or there is nothing to average over, and
    RuntimeError when the gradient is differentiated again.
    """
    if not 1 <= len(terms) <= MOST_TERMS:
        raise ValueError(f"terms: {len(terms)} tensors, expected 1 to {MOST_TERMS}")
    _check_samples(pred=pred, **{f"terms[{n}]": term for n, term in enumerate(terms)})
    return _loss(pred, terms, coefficients, weight, mask)


def _loss(pred: Tensor, terms: Sequence[Tensor], coefficients: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    _check_rows(len(pred), len(terms), coefficients=coefficients)
    if weight.shape != (len(pred),):
        raise ValueError(f"weight: shape {tuple(weight.shape)}, expected ({len(pred)},)")
    if pred.numel() == 0:
        raise ValueError(f"pred: shape {tuple(pred.shape)} has no element to average over")
    widest = next((tensor for tensor in (pred, *terms) if tensor.dtype == torch.float64), pred)
    arguments = (
        pred.contiguous(),
        [term.detach().contiguous() for term in terms],
        _table(coefficients, widest),
        _table(weight, widest),
        None if mask is None else _repeating_mask(mask.detach(), pred),
    )
    if pred.requires_grad and torch.is_grad_enabled():
        return cast(Tensor, _Loss.apply(*arguments))
    return _OPERATORS.weighted_loss.default(*arguments, False)[0]


def gram(gradients: Gradients) -> Tensor:
    """Compute the inner products of K gradients: float64 [K, K] on their device, symmetric.

    Sums have one fixed order. On a CPU equal gradients give equal bits, whatever the number of threads and however the
    elements are spread over entries; on a GPU entries and their alignment decide the order. Two float32 gradients are
    multiplied and summed in float64. Others are multiplied in float32, and short runs (64 products on a CPU) summed in
    it: within 1e-5 of |g_i| |g_j|, in practice 1e-7. There, elements above 1e19 overflow to infinity and below 1e-22
    count as 0 (and on gfx90a, for K > 2, float16 below 6e-5). NaN and infinity propagate. Extra memory: O(K^2) numbers.
    Raises ValueError when there is no gradient, or when gradients differ in an entry's shape.
    """
    entries = _check_gradients(gradients)
    filled = [[tensor.detach() for tensor in gradient if tensor.numel()] for gradient in entries]
    if not filled[0]:
        device = entries[0][0].device if entries[0] else None
        return torch.zeros(len(entries), len(entries), dtype=torch.float64, device=device)
    return _OPERATORS.gram.default([tensor for gradient in filled for tensor in gradient], len(filled))


def preconditioned_gram(
    gradients: Gradients, second_moment: Gradient, *, correction: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute the inner products of K gradients, and those under AdamW's preconditioner: two float64 [K, K].

    The first is `gram(gradients)`, the second `sum_n p_n g_in g_jn` with `p = 1 / (sqrt(second_moment / correction) +
    eps)`: AdamW moves a weight by p times its gradient, so this product says how a step along g_i changes the loss of
    g_j. Both take one read of every gradient and of `second_moment`.
    second_moment: AdamW's `exp_avg_sq`, float32 (or float64: the reference), the shape of a gradient, entry by entry.
    correction: its bias correction `1 - beta2^steps`, in (0, 1]. eps: AdamW's, positive.
    p is computed in float32 and is the same in all products, so the second matrix is as exact as the first for a p
    within 3e-7 of the true one, relatively. With two gradients the sums are float64, on a GPU if both are float32. For
    the others elements above 1e15 overflow to infinity. NaN and infinity of a gradient, and NaN of the moment,
    propagate. Raises ValueError as `gram` does, for a moment of another dtype, and for numbers out of range.
    """
    entries, moment = _check_gradients(gradients), _entries(second_moment)
    _check_same_shapes(moment, entries[0], "second_moment")
    for i, tensor in enumerate(moment):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"second_moment[{i}]: dtype {tensor.dtype}, expected torch.float32 or torch.float64")
    if not 0 < correction <= 1:
        raise ValueError(f"correction: {correction}, expected a number in (0, 1]")
    if not eps > 0:
        raise ValueError(f"eps: {eps}, expected a positive number")
    filled = [[tensor.detach() for tensor in row if tensor.numel()] for row in (*entries, moment)]
    if not filled[0]:
        device = moment[0].device if moment else None
        zeros = torch.zeros(2, len(entries), len(entries), dtype=torch.float64, device=device)
        return zeros[0], zeros[1]
    *rows, last = filled
    both = _OPERATORS.preconditioned_gram.default([tensor for row in rows for tensor in row], last, correction, eps)
    return both[0], both[1]


def combine_(out: Gradient, gradients: Gradients, coefficients: Tensor) -> None:
    """Write `sum_k coefficients_k gradient_k` into `out`.

    out: the shape of a gradient, entry by entry. It may BE one of the gradients, but must not overlap one in any other
    way.
    coefficients: [K], float64 on the host. Computed in float32 (float64 if a tensor is) and rounded once, to the dtype
    of `out`. A coefficient of 0 does not hide a NaN. Extra memory: O(1). Two gradients are the fast case.
    Raises ValueError when shapes or the number of coefficients do not agree.
    """
    entries = _check_gradients(gradients)
    outs = _entries(out)
    _check_same_shapes(outs, entries[0], "out")
    if coefficients.shape != (len(entries),):
        raise ValueError(f"coefficients: shape {tuple(coefficients.shape)}, expected ({len(entries)},)")
    filled = [i for i, tensor in enumerate(outs) if tensor.numel()]
    if filled:
        tensors = [gradient[i].detach() for gradient in entries for i in filled]
        _OPERATORS.combine_.default(
            [outs[i].detach() for i in filled], tensors, coefficients.detach().to("cpu", torch.float64)
        )


def axpby_(y: Gradient, a: float, x: Gradient, b: float) -> None:
    """Write `a x + b y` into `y`: `combine_` for two gradients."""
    combine_(y, [x, y], torch.tensor([a, b], dtype=torch.float64, device="cpu"))


# Not `custom_op`, which costs 50 us of Python per call. Other devices have no float64 for the reference.
_DEVICES = ("cpu", "cuda", "xpu")
define(
    "unlearn_kernels::noise_and_target",
    "(Tensor x_f, Tensor x_s, Tensor eps, Tensor path, Tensor coefficients, bool with_target) -> Tensor[]",
)
define(
    "unlearn_kernels::weighted_loss",
    "(Tensor pred, Tensor[] terms, Tensor coefficients, Tensor weight, Tensor? mask, bool with_gradient)"
    " -> (Tensor, Tensor)",
)
define("unlearn_kernels::gram", "(Tensor[] tensors, int count) -> Tensor")
define(
    "unlearn_kernels::preconditioned_gram",
    "(Tensor[] tensors, Tensor[] second_moment, float correction, float eps) -> Tensor",
)
define("unlearn_kernels::combine_", "(Tensor(a!)[] out, Tensor[] tensors, Tensor coefficients) -> ()")


@impl("unlearn_kernels::noise_and_target", _DEVICES)
def _noise_and_target(
    x_f: Tensor, x_s: Tensor, eps: Tensor, path: Tensor, coefficients: Tensor, with_target: bool
) -> list[Tensor]:
    backend = backend_for([x_f, x_s, eps])
    x_t, target = backend.noise_and_target(x_f, x_s, eps, path, coefficients, with_target=with_target)
    return [x_t] if target is None else [x_t, target]


@register_fake("unlearn_kernels::noise_and_target")
def _(x_f: Tensor, x_s: Tensor, eps: Tensor, path: Tensor, coefficients: Tensor, with_target: bool) -> list[Tensor]:
    return [torch.empty_like(x_f) for _ in range(2 if with_target else 1)]


@impl("unlearn_kernels::weighted_loss", _DEVICES)
def _weighted_loss(
    pred: Tensor,
    terms: list[Tensor],
    coefficients: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient in pred; that is empty if it is not wanted, as operators cannot return None."""
    backend = backend_for([pred, *terms])
    loss, gradient = backend.weighted_loss(pred, terms, coefficients, weight, mask, with_gradient=with_gradient)
    return loss, pred.new_empty(0) if gradient is None else gradient


@register_fake("unlearn_kernels::weighted_loss")
def _(
    pred: Tensor,
    terms: list[Tensor],
    coefficients: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    double = any(tensor.dtype == torch.float64 for tensor in (pred, *terms))
    loss = pred.new_empty((), dtype=torch.float64 if double else torch.float32)
    return loss, torch.empty_like(pred, dtype=gradient_dtype(pred)) if with_gradient else pred.new_empty(0)


class _Loss(torch.autograd.Function):
    """Differentiates the loss by the gradient computed with it. `register_autograd` would cost 100 us per call."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: torch.autograd.function.FunctionCtx,
        pred: Tensor,
        terms: list[Tensor],
        coefficients: Tensor,
        weight: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        loss, gradient = _OPERATORS.weighted_loss.default(pred, terms, coefficients, weight, mask, True)
        ctx.save_for_backward(gradient)
        ctx.dtype = pred.dtype  # pyright: ignore[reportAttributeAccessIssue]
        return loss

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: torch.autograd.function.FunctionCtx, upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # The saved gradient is a constant: differentiating it again would give a silent 0.
            raise RuntimeError("weighted_loss: differentiating its gradient again is not supported (create_graph=True)")
        (gradient,) = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        scaled = gradient if _is_one(upstream) else gradient * upstream
        return scaled.to(ctx.dtype), None, None, None, None  # pyright: ignore[reportAttributeAccessIssue]


def _is_one(scale: Tensor) -> bool:
    """Detect a scale of 1 on the host, which saves a pass. Traced and fake tensors have no value to look at."""
    if torch.compiler.is_compiling() or type(scale) is not Tensor or scale.device.type != "cpu":
        return False
    return scale.item() == 1


@impl("unlearn_kernels::gram", _DEVICES)
def _gram(tensors: list[Tensor], count: int) -> Tensor:
    """Run the backend. tensors: the entries of gradient 0, then those of gradient 1, and so on."""
    return backend_for(tensors).gram(_split([tensor.contiguous() for tensor in tensors], count))


@register_fake("unlearn_kernels::gram")
def _(tensors: list[Tensor], count: int) -> Tensor:
    return tensors[0].new_empty((count, count), dtype=torch.float64)


@impl("unlearn_kernels::preconditioned_gram", _DEVICES)
def _preconditioned_gram(tensors: list[Tensor], second_moment: list[Tensor], correction: float, eps: float) -> Tensor:
    """Run the backend: [2, K, K]. tensors: as in `_gram`, as many entries per gradient as `second_moment` has."""
    gradients = _split([tensor.contiguous() for tensor in tensors], len(tensors) // len(second_moment))
    moment = [tensor.contiguous() for tensor in second_moment]
    return backend_for([*tensors, *moment]).preconditioned_gram(gradients, moment, correction, eps)


@register_fake("unlearn_kernels::preconditioned_gram")
def _(tensors: list[Tensor], second_moment: list[Tensor], correction: float, eps: float) -> Tensor:
    count = len(tensors) // len(second_moment)
    return tensors[0].new_empty((2, count, count), dtype=torch.float64)


@impl("unlearn_kernels::combine_", _DEVICES)
def _combine_(out: list[Tensor], tensors: list[Tensor], coefficients: Tensor) -> None:
    backend = backend_for([*out, *tensors])
    flat = [tensor.contiguous() for tensor in out]
    gradients = _split([tensor.contiguous() for tensor in tensors], len(coefficients))
    backend.combine_(flat, gradients, coefficients.tolist())
    for tensor, result in zip(out, flat, strict=True):
        if result is not tensor:
            tensor.copy_(result)
    # The kernels write behind autograd's back, so that it must be told that saved values have changed.
    torch.autograd.graph.increment_version(out)


@register_fake("unlearn_kernels::combine_")
def _(out: list[Tensor], tensors: list[Tensor], coefficients: Tensor) -> None:
    return None


def _split(tensors: list[Tensor], count: int) -> list[list[Tensor]]:
    size = len(tensors) // count
    return [tensors[k * size : (k + 1) * size] for k in range(count)]


def _table(table: Tensor, like: Tensor) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return table.detach().to(like.device, dtype).contiguous()


def _repeating_mask(mask: Tensor, pred: Tensor) -> Tensor:
    """Return the mask as [B, S], where S elements repeat along a sample: one plane for all channels stays one plane."""
    try:
        fits = torch.broadcast_shapes(mask.shape, pred.shape) == pred.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"mask: shape {tuple(mask.shape)} does not broadcast to {tuple(pred.shape)}")
    shape = (1,) * (pred.ndim - mask.ndim) + tuple(mask.shape)
    first = next((d for d in range(1, pred.ndim) if shape[d] != 1), pred.ndim)
    if math.prod(pred.shape[first:]) < SHORTEST_PLANE:
        first = 1
    plane = _table(mask, pred).reshape(shape)
    return plane.expand(len(pred), *shape[1:first], *pred.shape[first:]).reshape(len(pred), -1).contiguous()


def _entries(gradient: Gradient) -> list[Tensor]:
    return [gradient] if isinstance(gradient, Tensor) else list(gradient)


def _check_gradients(gradients: Gradients) -> list[list[Tensor]]:
    if isinstance(gradients, Tensor):
        if gradients.ndim != 2:
            raise ValueError(f"gradients: shape {tuple(gradients.shape)}, expected a matrix [K, N] or a sequence")
        gradients = gradients.unbind(0)
    entries = [_entries(gradient) for gradient in gradients]
    if not entries:
        raise ValueError("gradients: at least one gradient is needed")
    for k, gradient in enumerate(entries):
        _check_same_shapes(gradient, entries[0], f"gradients[{k}]")
    return entries


def _check_same_shapes(gradient: list[Tensor], first: list[Tensor], name: str) -> None:
    if len(gradient) != len(first):
        raise ValueError(f"{name}: {len(gradient)} entries, gradients[0] has {len(first)}")
    for i, (a, b) in enumerate(zip(gradient, first, strict=True)):
        if a.shape != b.shape:
            raise ValueError(f"{name}[{i}]: shape {tuple(a.shape)}, in gradients[0] it is {tuple(b.shape)}")
        if a.device != first[0].device:
            raise ValueError(f"{name}[{i}]: on {a.device}, gradients[0][0] is on {first[0].device}")
        if not a.is_floating_point():
            raise ValueError(f"{name}[{i}]: dtype {a.dtype}, expected a floating one")


def _check_samples(**tensors: Tensor) -> None:
    first, shape, device = next((name, tensor.shape, tensor.device) for name, tensor in tensors.items())
    for name, tensor in tensors.items():
        if tensor.ndim == 0 or tensor.shape != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected [B, ...] as {first} {tuple(shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: dtype {tensor.dtype}, expected a floating one")
        if tensor.device != device:
            raise ValueError(f"{name}: on {tensor.device}, {first} is on {device}")


def _check_rows(batch: int, columns: int, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != (batch, columns):
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected ({batch}, {columns})")
