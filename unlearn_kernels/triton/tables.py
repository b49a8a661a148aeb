"""One launch for a list of tensors: a table of their addresses and sizes, and the way from a chunk to its entry.

Entries are cut into chunks of CHUNK elements, which are numbered through. For E entries and K gradients, a table is
int64::

    first chunk of the entry [E] | elements [E] | addresses [rows, E] | extra numbers

It is built anew for every call: DeepSpeed frees and reallocates the storage of gradients, so a table kept for the same
tensor objects could point at memory that is no longer theirs. The cost is one copy of a few kB.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1 << 15
"""A guess: 128 kB of a bfloat16 pair, long enough to hide the look-up, short enough to share 10M elements widely."""

ALIGNMENT = 16
"""Bytes of a 128-bit load."""

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@dataclass(frozen=True)
class Group:
    """Entries that one launch can take: each row has one dtype, and the addresses are either all aligned or not."""

    dtypes: tuple[torch.dtype, ...]
    aligned: bool
    rows: list[list[Tensor]]

    @property
    def chunks(self) -> int:
        return sum(triton.cdiv(tensor.numel(), CHUNK) for tensor in self.rows[0])

    def table(self, extra: Sequence[int] = ()) -> Tensor:
        sizes = [tensor.numel() for tensor in self.rows[0]]
        first, count = [], 0
        for size in sizes:
            first.append(count)
            count += triton.cdiv(size, CHUNK)
        addresses = [tensor.data_ptr() for row in self.rows for tensor in row]
        table = torch.tensor([*first, *sizes, *addresses, *extra], dtype=torch.int64, device="cpu")
        return table.to(self.rows[0][0].device, non_blocking=True)


def groups(rows: Sequence[Sequence[Tensor]]) -> list[Group]:
    """Group the entries of `rows` (lists of tensors with equal shapes, entry by entry) into launches."""
    found: dict[tuple[tuple[torch.dtype, ...], bool], Group] = {}
    for tensors in zip(*rows, strict=True):
        dtypes = tuple(tensor.dtype for tensor in tensors)
        aligned = all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in tensors)
        group = found.setdefault((dtypes, aligned), Group(dtypes, aligned, [[] for _ in rows]))
        for row, tensor in zip(group.rows, tensors, strict=True):
            row.append(tensor)
    return list(found.values())


@triton.jit
def locate(table, entries, chunk, CHUNK: tl.constexpr):
    """Return the entry of a chunk, the chunk's offset in it, and the number of elements in the chunk."""
    low, high = 0, entries
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table + middle) <= chunk
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    offset = (chunk - tl.load(table + low)) * CHUNK
    return low, offset, tl.minimum(tl.load(table + entries + low) - offset, CHUNK).to(tl.int32)


@triton.jit
def address_of(table, entries, entry, row, offset, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a pointer to the beginning of a chunk in one row of the table."""
    stored = tl.load(table + (2 + row) * entries + entry)
    pointer = stored.to(tl.pointer_type(TYPE)) + offset  # pyright: ignore[reportArgumentType]
    # Without this hint the compiler knows nothing of an address that was itself loaded, and vectorises no load.
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer
