"""The parts that launches share: threads per program, compiler options, and the sum that makes results reproducible."""

from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

THREADS = 256
"""A guess: 8 programs fill a multiprocessor of 2048 threads, and a thread loads 16 bytes of each tensor at a time."""

SUM_BLOCK = 1024

Constants: TypeAlias = Mapping[str, object]
"""Compile-time arguments of a kernel. A launch and its ahead-of-time build get them from the same function."""


class Kernel(Protocol):
    """A function compiled by triton.jit."""

    arg_names: list[str]

    def __getitem__(self, grid: tuple[int, ...], /) -> Callable[..., object]: ...


def options(threads: int, *, warp_size: int) -> dict[str, int | bool]:
    """Return compiler options for a number of threads. As CDNA's wavefront is twice a warp, a program has half as many.

    enable_fp_fusion is explicit: Triton 3.10 changes its default, and with it the last bits of a result.
    """
    return {"num_warps": threads // warp_size, "enable_fp_fusion": True}


def launch(
    kernel: Kernel,
    programs: int,
    on: Tensor,
    arguments: tuple[object, ...],
    constants: Constants,
    *,
    threads: int = THREADS,
) -> None:
    """Run on the device of `on`, which need not be the current one."""
    with torch.cuda.device_of(on):
        kernel[(programs,)](*arguments, **constants, **options(threads, warp_size=64 if torch.version.hip else 32))


@triton.jit(do_not_specialize=["count"])
def ordered_sum_kernel(values, sums, size, count, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr):
    """Write the sum of values[row, :size] to sums[row]. SYMMETRIC: rows are cells [count, count], lower ones unset."""
    program = tl.program_id(0)
    row = program
    if SYMMETRIC:
        i, j = program // count, program % count
        row = tl.minimum(i, j) * count + tl.maximum(i, j)
    start = values + row.to(tl.int64) * size
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for at in range(0, size, BLOCK):
        total += tl.load(start + at + lane, mask=lane < size - at, other=0).to(tl.float64)
    tl.store(sums + program, tl.sum(total).to(sums.dtype.element_ty))


def sum_constants(*, symmetric: bool) -> Constants:
    return {"SYMMETRIC": symmetric, "BLOCK": SUM_BLOCK}


def ordered_sum(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum the rows of `values` [R, N] to [R] in `dtype`, adding in float64 in an order that depends on N alone.

    torch.sum would choose its order by the device's number of multiprocessors.
    """
    sums = values.new_empty(len(values), dtype=dtype)
    launch(ordered_sum_kernel, len(sums), sums, (values, sums, values.shape[1], 0), sum_constants(symmetric=False))
    return sums


def ordered_gram(partials: Tensor) -> Tensor:
    """Apply `ordered_sum` to [K, K, N], giving float64 [K, K] with the upper half mirrored below."""
    sums = partials.new_empty(partials.shape[:2])
    arguments = (partials, sums, partials.shape[2], len(sums))
    launch(ordered_sum_kernel, sums.numel(), sums, arguments, sum_constants(symmetric=True))
    return sums
