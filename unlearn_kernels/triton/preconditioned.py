"""preconditioned_gram: the inner products of K gradients, plain and under AdamW's preconditioner, in one pass.

The second moment is the row of the table behind the gradients. Where a gradient is in registers anyway, so is its
product with the preconditioner: beside `grams` it costs one more read, of the moment, and twice the products.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.triton.grams import (
    PROGRAMS,
    TILES,
    UNSPECIALISED,
    gradient_rows,
    pair_constants,
    pair_places,
    tile_places,
)
from unlearn_kernels.triton.launches import THREADS, Constants, launch, ordered_gram
from unlearn_kernels.triton.tables import CHUNK, TYPES, Group, address_of, groups, locate

MOMENT = tl.constexpr(tl.float32)
"""The dtype of the second moment, in which AdamW keeps it."""


def tile_constants(dtype: tl.dtype, tile: int, *, diagonal: bool, aligned: bool) -> Constants:
    """Factors are float32 whatever the dtype: a weighted gradient rounded to 16 bits would be off by 2^-9."""
    _, block = _tile_shape(dtype, tile, aligned=aligned)
    return {"TYPE": dtype, "ALIGNED": aligned, "DIAGONAL": diagonal, "CHUNK": CHUNK, "TILE": tile, "BLOCK": block}


def tile_threads(dtype: tl.dtype, tile: int, *, aligned: bool) -> int:
    threads, _ = _tile_shape(dtype, tile, aligned=aligned)
    return threads


def _tile_shape(dtype: tl.dtype, tile: int, *, aligned: bool) -> tuple[int, int]:
    """Return the threads of a program, and how many products are summed in float32 before they are added in float64.

    A thread loads 16 bytes of an aligned gradient at a time. What is not aligned takes registers for an address per
    element, so its block is narrow.
    """
    if tile == TILES[0]:
        return 64 if aligned else 128, 32
    if aligned:
        return 256 if dtype == tl.float32 else 128, 32
    return 256, 16


@triton.jit
def _preconditioner(moment, scale, eps):
    return 1.0 / (scale * tl.sqrt(moment) + eps)


@triton.jit(do_not_specialize=(*UNSPECIALISED, "scale", "eps"))
def preconditioned_pair_kernel(
    table,
    partials,
    entries,
    chunks,
    count,
    i,
    j,
    row,
    stride,
    scale,
    eps,
    X: tl.constexpr,
    Y: tl.constexpr,
    SUM: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """<i, i>, <i, j> and <j, j>, plain and weighted, summed as in `grams`."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    total_xx = tl.full([], 0, tl.float64)
    total_xy = tl.full([], 0, tl.float64)
    total_yy = tl.full([], 0, tl.float64)
    weighted_xx = tl.full([], 0, tl.float64)
    weighted_xy = tl.full([], 0, tl.float64)
    weighted_yy = tl.full([], 0, tl.float64)
    for chunk in range(program, chunks, tl.num_programs(0)):
        entry, offset, size = locate(table, entries, chunk, CHUNK)
        x = address_of(table, entries, entry, i, offset, X, ALIGNED) + lane
        y = address_of(table, entries, entry, j, offset, Y, ALIGNED) + lane
        v = address_of(table, entries, entry, count, offset, MOMENT, ALIGNED) + lane
        xx = tl.zeros([BLOCK], SUM)
        xy = tl.zeros([BLOCK], SUM)
        yy = tl.zeros([BLOCK], SUM)
        wxx = tl.zeros([BLOCK], SUM)
        wxy = tl.zeros([BLOCK], SUM)
        wyy = tl.zeros([BLOCK], SUM)
        whole = size // BLOCK * BLOCK
        for at in range(0, whole, BLOCK):
            w = _preconditioner(tl.load(v + at), scale, eps).to(SUM)
            p, q = tl.load(x + at).to(SUM), tl.load(y + at).to(SUM)
            xx += p * p
            xy += p * q
            yy += q * q
            wxx += w * p * p
            wxy += w * p * q
            wyy += w * q * q
        # Only an entry's last block is masked, because the bound of a mask prevents vector loads.
        if whole < size:
            inside = lane < size - whole
            w = _preconditioner(tl.load(v + whole, mask=inside, other=0), scale, eps).to(SUM)
            p = tl.load(x + whole, mask=inside, other=0).to(SUM)
            q = tl.load(y + whole, mask=inside, other=0).to(SUM)
            xx += p * p
            xy += p * q
            yy += q * q
            wxx += w * p * p
            wxy += w * p * q
            wyy += w * q * q
        total_xx += tl.sum(xx.to(tl.float64))
        total_xy += tl.sum(xy.to(tl.float64))
        total_yy += tl.sum(yy.to(tl.float64))
        weighted_xx += tl.sum(wxx.to(tl.float64))
        weighted_xy += tl.sum(wxy.to(tl.float64))
        weighted_yy += tl.sum(wyy.to(tl.float64))
    own = partials + row + program
    tl.store(own + (i * count + i) * stride, total_xx)
    tl.store(own + (i * count + j) * stride, total_xy)
    tl.store(own + (j * count + j) * stride, total_yy)
    own += count * count * stride
    tl.store(own + (i * count + i) * stride, weighted_xx)
    tl.store(own + (i * count + j) * stride, weighted_xy)
    tl.store(own + (j * count + j) * stride, weighted_yy)


@triton.jit(do_not_specialize=(*UNSPECIALISED, "scale", "eps"))
def preconditioned_tile_kernel(
    table,
    partials,
    entries,
    chunks,
    count,
    i,
    j,
    row,
    stride,
    scale,
    eps,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIAGONAL: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply TILE gradients from i on, plain and weighted, with TILE gradients from j on."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([TILE, TILE], tl.float64)
    weighted = tl.zeros([TILE, TILE], tl.float64)
    for chunk in range(program, chunks, tl.num_programs(0)):
        entry, offset, size = locate(table, entries, chunk, CHUNK)
        x, x_present = gradient_rows(table, entries, entry, offset, i, count, TYPE, ALIGNED, TILE)
        y, y_present = gradient_rows(table, entries, entry, offset, j, count, TYPE, ALIGNED, TILE)
        v = address_of(table, entries, entry, count, offset, MOMENT, ALIGNED)
        whole = size // BLOCK * BLOCK
        for at in range(0, whole, BLOCK):
            w = _preconditioner(tl.load(v + at + lane), scale, eps)
            p = tl.load(x + at + lane, mask=x_present, other=0).to(tl.float32)
            q = p
            if not DIAGONAL:
                q = tl.load(y + at + lane, mask=y_present, other=0).to(tl.float32)
            total += tl.dot(p, tl.trans(q), input_precision="ieee").to(tl.float64)
            weighted += tl.dot(w * p, tl.trans(q), input_precision="ieee").to(tl.float64)
        if whole < size:
            inside = lane < size - whole
            w = _preconditioner(tl.load(v + whole + lane, mask=inside, other=0), scale, eps)
            p = tl.load(x + whole + lane, mask=x_present & inside, other=0).to(tl.float32)
            q = p
            if not DIAGONAL:
                q = tl.load(y + whole + lane, mask=y_present & inside, other=0).to(tl.float32)
            total += tl.dot(p, tl.trans(q), input_precision="ieee").to(tl.float64)
            weighted += tl.dot(w * p, tl.trans(q), input_precision="ieee").to(tl.float64)
    a = i + tl.arange(0, TILE)[:, None]
    b = j + tl.arange(0, TILE)[None, :]
    cells = partials + row + program + (a * count + b) * stride
    inside = (a < count) & (b < count)
    tl.store(cells, total, mask=inside)
    tl.store(cells + count * count * stride, weighted, mask=inside)


def preconditioned_gram(
    gradients: Sequence[Sequence[Tensor]], second_moment: Sequence[Tensor], correction: float, eps: float
) -> Tensor:
    """Compute both Gram matrices. Up to 32 gradients of one dtype are read once; more are read once per tile of 32."""
    parts = groups([*gradients, second_moment])
    programs = [min(part.chunks, PROGRAMS) for part in parts]
    shape = (2, len(gradients), len(gradients), sum(programs))
    partials = torch.empty(shape, dtype=torch.float64, device=second_moment[0].device)
    for n, part in enumerate(parts):
        _fill(partials, sum(programs[:n]), programs[n], part, correction**-0.5, eps)
    return torch.stack([ordered_gram(matrix) for matrix in partials])


def _fill(partials: Tensor, row: int, programs: int, part: Group, scale: float, eps: float) -> None:
    """Write inner products of the group's entries to partials[:, :, :, row : row + programs], at least for i <= j."""
    count = len(part.rows) - 1
    types = [TYPES[dtype] for dtype in part.dtypes[:-1]]
    shape = (part.table(), partials, len(part.rows[0]), part.chunks, count)
    if count > 2 and len(set(types)) == 1:
        tile, tiles = tile_places(count)
        kernel, threads = preconditioned_tile_kernel, tile_threads(types[0], tile, aligned=part.aligned)
        places = {(i, j): tile_constants(types[0], tile, diagonal=i == j, aligned=part.aligned) for i, j in tiles}
    else:
        # Mixed dtypes do not fit one tile.
        kernel, threads = preconditioned_pair_kernel, THREADS
        places = {(i, j): pair_constants(types[i], types[j], aligned=part.aligned) for i, j in pair_places(count)}
    for (i, j), constants in places.items():
        arguments = (*shape, i, j, row, partials.shape[-1], scale, eps)
        launch(kernel, programs, partials, arguments, constants, threads=threads)
