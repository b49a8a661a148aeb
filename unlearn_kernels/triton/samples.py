"""noise_and_target and weighted_loss: [B, ...] tensors with per-sample coefficients, one sweep each.

Arithmetic in float32 registers. A sample's elements are vectorised where 16 divides their number, as for every latent.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.backends import gradient_dtype
from unlearn_kernels.triton.launches import Constants, launch, ordered_sum

BLOCK = 2048
"""Elements per program. A guess: 16 bytes of a 16-bit tensor per thread; float32 takes two loads of them."""

# `size` and `plane` are left to specialise: as multiples of 16 they allow vector loads.
UNSPECIALISED = ("blocks", "scale")


@triton.jit(do_not_specialize=UNSPECIALISED)
def noise_and_target_kernel(
    x_f, x_s, eps, path, coefficients, x_t, target, size, blocks, WITH_TARGET: tl.constexpr, BLOCK: tl.constexpr
):
    sample, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first = block.to(tl.int64) * BLOCK
    start = sample.to(tl.int64) * size + first
    lane = tl.arange(0, BLOCK)
    inside = lane < size - first
    # Straight to float32: the interpreter stores bfloat16 as integers, and would compute with those.
    image = tl.load(x_f + start + lane, mask=inside).to(tl.float32)
    noise = tl.load(eps + start + lane, mask=inside).to(tl.float32)
    a, b = tl.load(path + sample * 2), tl.load(path + sample * 2 + 1)
    tl.store(x_t + start + lane, (a * image + b * noise).to(x_t.dtype.element_ty), mask=inside)
    if WITH_TARGET:
        surrogate = tl.load(x_s + start + lane, mask=inside).to(tl.float32)
        c_eps, c_f = tl.load(coefficients + sample * 3), tl.load(coefficients + sample * 3 + 1)
        c_s = tl.load(coefficients + sample * 3 + 2)
        mixed = c_eps * noise + c_f * image + c_s * surrogate
        tl.store(target + start + lane, mixed.to(target.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALISED)
def weighted_loss_kernel(
    pred,
    terms,
    coefficients,
    weight,
    mask,
    mask_sums,
    gradient,
    partials,
    size,
    blocks,
    plane,
    scale,
    WITH_GRADIENT: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """terms is a tuple of pointers. The factor of a square in the loss: weight * scale, over mask_sums if MASKED."""
    sample, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first = block.to(tl.int64) * BLOCK
    start = sample.to(tl.int64) * size + first
    lane = tl.arange(0, BLOCK)
    inside = lane < size - first
    difference = tl.load(pred + start + lane, mask=inside, other=0).to(tl.float32)
    for n in tl.static_range(len(terms)):  # pyright: ignore[reportGeneralTypeIssues]
        c = tl.load(coefficients + sample * len(terms) + n)
        difference -= c * tl.load(terms[n] + start + lane, mask=inside, other=0).to(tl.float32)
    factor = tl.load(weight + sample) * scale
    if MASKED:
        # The plane repeats along a sample. Its offset in the block is reduced first, so that lanes wrap in 32 bits.
        wrapped = ((first % plane).to(tl.int32) + lane) % plane
        keep = tl.load(mask + sample.to(tl.int64) * plane + wrapped, mask=inside, other=0)
        difference = tl.where(keep != 0, difference, 0)
        elements = tl.load(mask_sums + sample).to(tl.float32)
        factor = tl.where(elements > 0, factor, 0) / tl.where(elements > 0, elements, 1)
        weighted = keep * difference
    else:
        weighted = difference
    if WITH_GRADIENT:
        slope = (2 * factor) * weighted
        tl.store(gradient + start + lane, slope.to(gradient.dtype.element_ty), mask=inside)
    partial = tl.sum(weighted * difference).to(tl.float64) * factor.to(tl.float64)
    tl.store(partials + tl.program_id(0), partial)


def noise_constants(*, with_target: bool) -> Constants:
    return {"WITH_TARGET": with_target, "BLOCK": BLOCK}


def loss_constants(*, with_gradient: bool, masked: bool) -> Constants:
    return {"WITH_GRADIENT": with_gradient, "MASKED": masked, "BLOCK": BLOCK}


def noise_and_target(
    x_f: Tensor, x_s: Tensor, eps: Tensor, path: Tensor, coefficients: Tensor, *, with_target: bool
) -> tuple[Tensor, Tensor | None]:
    x_t = torch.empty_like(x_f)
    target = torch.empty_like(x_f) if with_target else None
    if x_f.numel() == 0:
        return x_t, target
    size = x_f.numel() // len(x_f)
    blocks = triton.cdiv(size, BLOCK)
    arguments = (x_f, x_s, eps, path, coefficients, x_t, target, size, blocks)
    launch(noise_and_target_kernel, len(x_f) * blocks, x_f, arguments, noise_constants(with_target=with_target))
    return x_t, target


def weighted_loss(
    pred: Tensor,
    terms: Sequence[Tensor],
    coefficients: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    *,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    batch, size = len(pred), pred.numel() // len(pred)
    blocks = triton.cdiv(size, BLOCK)
    gradient = torch.empty_like(pred, dtype=gradient_dtype(pred)) if with_gradient else None
    partials = torch.empty(1, batch * blocks, dtype=torch.float64, device=pred.device)
    plane = size if mask is None else mask.shape[1]
    # A mask's sum counts one plane; without one, all of a sample's elements count.
    scale = 1 / (batch * (size if mask is None else size // plane))
    mask_sums = None if mask is None else ordered_sum(mask, torch.float64)
    tensors = (pred, tuple(terms), coefficients, weight, mask, mask_sums, gradient, partials)
    constants = loss_constants(with_gradient=with_gradient, masked=mask is not None)
    launch(weighted_loss_kernel, batch * blocks, pred, (*tensors, size, blocks, plane, scale), constants)
    return ordered_sum(partials, torch.float32)[0], gradient
