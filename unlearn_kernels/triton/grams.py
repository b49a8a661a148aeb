"""gram: inner products of K gradients, each the same list of entries, in one launch for the whole list.

K = 2 is the everyday case and bound by memory: each element is read once, three products of it are summed. Chunks are
shared out to at most PROGRAMS programs, each with its own partial sums, so a result depends on the sizes alone.
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from unlearn_kernels.triton.launches import THREADS, Constants, launch, ordered_gram
from unlearn_kernels.triton.tables import CHUNK, TYPES, Group, address_of, groups, locate

# Guesses: 16 bytes of a 16-bit tensor per thread; half of that where sums take float64 registers.
BLOCK = 2048
WIDE_BLOCK = 1024

PROGRAMS = 4096
"""A guess: 2 to 4 waves of the largest GPUs, and 32 MB of partial sums at K = 32."""

TILE_COLUMNS = 128
"""The number of products that the tile kernel sums in float32 before they are added in float64."""
TILES = (16, 32)
"""The number of gradients in a tile; tl.dot takes no fewer than 16, and 64 of them would spill."""

# One build per dtype: by default Triton makes a new build for each mix of numbers that are 1 or multiples of 16.
UNSPECIALISED = ("entries", "chunks", "count", "i", "j", "row", "stride")


def pair_constants(x: tl.dtype, y: tl.dtype, *, aligned: bool) -> Constants:
    """Two float32 gradients are multiplied in float64: on data-centre GPUs memory still bounds that."""
    wide = x == y == tl.float32
    return {
        "X": x,
        "Y": y,
        "SUM": tl.float64 if wide else tl.float32,
        "ALIGNED": aligned,
        "CHUNK": CHUNK,
        "BLOCK": WIDE_BLOCK if wide else BLOCK,
    }


def tile_constants(dtype: tl.dtype, tile: int, *, diagonal: bool, aligned: bool) -> Constants:
    """Choose the dtype of factors: 16-bit ones go to the matrix units, whose products are exact. The interpreter gets
    those wrong, so it gets float32.

    CDNA2's units take subnormals for 0: float16 below 6e-5, on gfx90a. float32 has no such units, and what is not
    aligned an address per element: both take registers. The block narrows until no target of `unlearn_kernels.aot`
    spills.
    """
    single = dtype == tl.float32
    narrow = 2 if single or not aligned else 1
    return {
        "TYPE": dtype,
        "FACTOR": tl.float32 if knobs.runtime.interpret else dtype,
        "ALIGNED": aligned,
        "DIAGONAL": diagonal,
        "CHUNK": CHUNK,
        "TILE": tile,
        "BLOCK": TILE_COLUMNS // (2 * narrow if single and not diagonal else narrow),
    }


def tile_places(count: int) -> tuple[int, list[tuple[int, int]]]:
    """Return the tile for `count` gradients, and the first row and column of each tile on and above the diagonal."""
    tile = next((rows for rows in TILES if rows >= count), TILES[-1])
    return tile, [(i, j) for i in range(0, count, tile) for j in range(i, count, tile)]


def pair_places(count: int) -> list[tuple[int, int]]:
    """Return the pairs of `count` gradients: beyond two, each gradient is in count - 1 of them, and read as often."""
    return list(itertools.combinations(range(count), 2)) or [(0, 0)]


def tile_threads(tile: int) -> int:
    """16 elements of a full block per thread."""
    return tile * TILE_COLUMNS // 16


@triton.jit(do_not_specialize=UNSPECIALISED)
def gram_pair_kernel(
    table,
    partials,
    entries,
    chunks,
    count,
    i,
    j,
    row,
    stride,
    X: tl.constexpr,
    Y: tl.constexpr,
    SUM: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """<i, i>, <i, j> and <j, j>. A lane sums at most CHUNK / BLOCK products in SUM, then they go to float64."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    total_xx = tl.full([], 0, tl.float64)
    total_xy = tl.full([], 0, tl.float64)
    total_yy = tl.full([], 0, tl.float64)
    for chunk in range(program, chunks, tl.num_programs(0)):
        entry, offset, size = locate(table, entries, chunk, CHUNK)
        x = address_of(table, entries, entry, i, offset, X, ALIGNED) + lane
        y = address_of(table, entries, entry, j, offset, Y, ALIGNED) + lane
        xx = tl.zeros([BLOCK], SUM)
        xy = tl.zeros([BLOCK], SUM)
        yy = tl.zeros([BLOCK], SUM)
        whole = size // BLOCK * BLOCK
        for at in tl.range(0, whole, BLOCK, loop_unroll_factor=2):  # pyright: ignore[reportGeneralTypeIssues]
            p, q = tl.load(x + at).to(SUM), tl.load(y + at).to(SUM)
            xx += p * p
            xy += p * q
            yy += q * q
        # Only an entry's last block is masked, because the bound of a mask prevents vector loads.
        if whole < size:
            inside = lane < size - whole
            p = tl.load(x + whole, mask=inside, other=0).to(SUM)
            q = tl.load(y + whole, mask=inside, other=0).to(SUM)
            xx += p * p
            xy += p * q
            yy += q * q
        total_xx += tl.sum(xx.to(tl.float64))
        total_xy += tl.sum(xy.to(tl.float64))
        total_yy += tl.sum(yy.to(tl.float64))
    own = partials + row + program
    tl.store(own + (i * count + i) * stride, total_xx)
    tl.store(own + (i * count + j) * stride, total_xy)
    tl.store(own + (j * count + j) * stride, total_yy)


@triton.jit
def gradient_rows(
    table, entries, entry, offset, first, count, TYPE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr
):
    """Return pointers [TILE, 1] to a chunk of the gradients from `first` on, and which of these exist."""
    gradient = first + tl.arange(0, TILE)
    present = gradient < count
    addresses = tl.load(table + (2 + gradient) * entries + entry, mask=present, other=0)
    pointers = (addresses.to(tl.pointer_type(TYPE)) + offset)[:, None]  # pyright: ignore[reportArgumentType]
    if ALIGNED:
        pointers = tl.multiple_of(pointers, [16, 16])
    return pointers, present[:, None]


@triton.jit(do_not_specialize=UNSPECIALISED)
def gram_tile_kernel(
    table,
    partials,
    entries,
    chunks,
    count,
    i,
    j,
    row,
    stride,
    TYPE: tl.constexpr,
    FACTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIAGONAL: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply TILE gradients from i on with TILE gradients from j on, by matrix products of FACTOR's dtype."""
    program = tl.program_id(0)
    lane = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([TILE, TILE], tl.float64)
    for chunk in range(program, chunks, tl.num_programs(0)):
        entry, offset, size = locate(table, entries, chunk, CHUNK)
        x, x_present = gradient_rows(table, entries, entry, offset, i, count, TYPE, ALIGNED, TILE)
        y, y_present = gradient_rows(table, entries, entry, offset, j, count, TYPE, ALIGNED, TILE)
        whole = size // BLOCK * BLOCK
        for at in range(0, whole, BLOCK):
            p = tl.load(x + at + lane, mask=x_present, other=0).to(FACTOR)
            q = p
            if not DIAGONAL:
                q = tl.load(y + at + lane, mask=y_present, other=0).to(FACTOR)
            total += tl.dot(p, tl.trans(q), input_precision="ieee").to(tl.float64)
        if whole < size:
            inside = lane < size - whole
            p = tl.load(x + whole + lane, mask=x_present & inside, other=0).to(FACTOR)
            q = p
            if not DIAGONAL:
                q = tl.load(y + whole + lane, mask=y_present & inside, other=0).to(FACTOR)
            total += tl.dot(p, tl.trans(q), input_precision="ieee").to(tl.float64)
    a = i + tl.arange(0, TILE)[:, None]
    b = j + tl.arange(0, TILE)[None, :]
    cells = partials + row + program + (a * count + b) * stride
    tl.store(cells, total, mask=(a < count) & (b < count))


def gram(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """Compute the Gram matrix. Up to 32 gradients of one dtype are read once; more are read once per tile of 32."""
    parts = groups(gradients)
    programs = [min(part.chunks, PROGRAMS) for part in parts]
    shape = (len(gradients), len(gradients), sum(programs))
    partials = torch.empty(shape, dtype=torch.float64, device=gradients[0][0].device)
    for n, part in enumerate(parts):
        _fill(partials, sum(programs[:n]), programs[n], part)
    return ordered_gram(partials)


def _fill(partials: Tensor, row: int, programs: int, part: Group) -> None:
    """Write inner products of the group's entries to partials[:, :, row : row + programs], at least for i <= j."""
    count = len(part.rows)
    types = [TYPES[dtype] for dtype in part.dtypes]
    shape = (part.table(), partials, len(part.rows[0]), part.chunks, count)
    if count > 2 and len(set(part.dtypes)) == 1:
        tile, tiles = tile_places(count)
        kernel, threads = gram_tile_kernel, tile_threads(tile)
        places = {(i, j): tile_constants(types[0], tile, diagonal=i == j, aligned=part.aligned) for i, j in tiles}
    else:
        # Mixed dtypes do not fit one tile.
        kernel, threads = gram_pair_kernel, THREADS
        places = {(i, j): pair_constants(types[i], types[j], aligned=part.aligned) for i, j in pair_places(count)}
    for (i, j), constants in places.items():
        launch(kernel, programs, partials, (*shape, i, j, row, partials.shape[-1]), constants, threads=threads)
