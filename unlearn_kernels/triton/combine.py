"""combine_: one gradient from K, each the same list of entries, in one launch for the whole list.

Bound by memory: K reads and one write per element. The coefficients travel in the table, as the bits of float32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.triton.launches import Constants, launch
from unlearn_kernels.triton.tables import CHUNK, CODES, TYPES, address_of, groups, locate

BLOCK = 2048
"""A guess: 16 bytes of a 16-bit tensor per thread."""

UNSPECIALISED = ("entries", "count")


def pair_constants(x: tl.dtype, y: tl.dtype, out: tl.dtype, *, aligned: bool) -> Constants:
    return {"X": x, "Y": y, "OUT": out, "ALIGNED": aligned, "CHUNK": CHUNK, "BLOCK": BLOCK}


def many_constants(types: Sequence[tl.dtype], out: tl.dtype, *, aligned: bool) -> Constants:
    """Combine any number of gradients. If their dtypes differ, each one's is looked up while the kernel runs."""
    same = types[0] if all(dtype == types[0] for dtype in types) else None
    return {"TYPE": same, "OUT": out, "ALIGNED": aligned, "CHUNK": CHUNK, "BLOCK": BLOCK}


@triton.jit(do_not_specialize=UNSPECIALISED)
def combine_pair_kernel(
    table,
    entries,
    X: tl.constexpr,
    Y: tl.constexpr,
    OUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute out = a x + b y, one chunk per program; out may be x or y."""
    entry, offset, size = locate(table, entries, tl.program_id(0), CHUNK)
    lane = tl.arange(0, BLOCK)
    x = address_of(table, entries, entry, 0, offset, X, ALIGNED) + lane
    y = address_of(table, entries, entry, 1, offset, Y, ALIGNED) + lane
    out = address_of(table, entries, entry, 2, offset, OUT, ALIGNED) + lane
    a, b = _coefficient(table + 5 * entries), _coefficient(table + 5 * entries + 1)
    whole = size // BLOCK * BLOCK
    for at in range(0, whole, BLOCK):
        p, q = tl.load(x + at).to(tl.float32), tl.load(y + at).to(tl.float32)
        tl.store(out + at, (a * p + b * q).to(OUT))
    if whole < size:
        inside = lane < size - whole
        p = tl.load(x + whole, mask=inside).to(tl.float32)
        q = tl.load(y + whole, mask=inside).to(tl.float32)
        tl.store(out + whole, (a * p + b * q).to(OUT), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALISED)
def combine_many_kernel(
    table,
    entries,
    count,
    TYPE: tl.constexpr,
    OUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute out = sum_k c_k gradient_k, one chunk per program. TYPE None: the table has each gradient's dtype."""
    entry, offset, size = locate(table, entries, tl.program_id(0), CHUNK)
    lane = tl.arange(0, BLOCK)
    out = address_of(table, entries, entry, count, offset, OUT, ALIGNED) + lane
    whole = size // BLOCK * BLOCK
    for at in range(0, whole, BLOCK):
        total = _sum_block(table, entries, count, entry, offset + at, lane, None, TYPE, ALIGNED, BLOCK)
        tl.store(out + at, total.to(OUT))
    if whole < size:
        inside = lane < size - whole
        total = _sum_block(table, entries, count, entry, offset + whole, lane, inside, TYPE, ALIGNED, BLOCK)
        tl.store(out + whole, total.to(OUT), mask=inside)


@triton.jit
def _sum_block(
    table, entries, count, entry, offset, lane, mask, TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    coefficients = table + (3 + count) * entries
    total = tl.zeros([BLOCK], tl.float32)
    # Three branches on the dtype, unrolled, would take too many registers.
    UNROLL: tl.constexpr = 2 if TYPE is not None else 1  # pyright: ignore[reportAssignmentType]
    for k in tl.range(0, count, loop_unroll_factor=UNROLL):  # pyright: ignore[reportGeneralTypeIssues]
        c = _coefficient(coefficients + k)
        if TYPE is not None:
            x = _load(table, entries, entry, k, offset, lane, mask, TYPE, ALIGNED)
        else:
            code = tl.load(coefficients + count + k)
            if code == 0:
                x = _load(table, entries, entry, k, offset, lane, mask, tl.float32, ALIGNED)
            elif code == 1:
                x = _load(table, entries, entry, k, offset, lane, mask, tl.bfloat16, ALIGNED)
            else:
                x = _load(table, entries, entry, k, offset, lane, mask, tl.float16, ALIGNED)
        total += c * x
    return total


@triton.jit
def _load(table, entries, entry, row, offset, lane, mask, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    return tl.load(address_of(table, entries, entry, row, offset, TYPE, ALIGNED) + lane, mask=mask).to(tl.float32)


@triton.jit
def _coefficient(place):
    return tl.load(place).to(tl.int32).to(tl.float32, bitcast=True)


def combine_(out: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]], coefficients: Sequence[float]) -> None:
    bits = torch.tensor(coefficients, dtype=torch.float32, device="cpu").view(torch.int32).tolist()
    for part in groups([*gradients, out]):
        *types, out_type = (TYPES[dtype] for dtype in part.dtypes)
        table = part.table([*bits, *(CODES[dtype] for dtype in part.dtypes[:-1])])
        arguments = (table, len(part.rows[0]))
        if len(types) == 2:
            constants = pair_constants(types[0], types[1], out_type, aligned=part.aligned)
            launch(combine_pair_kernel, part.chunks, table, arguments, constants)
        else:
            constants = many_constants(types, out_type, aligned=part.aligned)
            launch(combine_many_kernel, part.chunks, table, (*arguments, len(types)), constants)
