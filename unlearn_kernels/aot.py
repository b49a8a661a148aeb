"""Compile every GPU kernel for every GPU family, without a GPU, and check the compilers' figures against limits.

    python -m unlearn_kernels.aot [--target sm90 --kernel gram_pair --dtype bf16 --json]

The table goes to stdout, progress to stderr. Exit code 1 where a limit is broken or a build fails. Registers, stack and
local memory come from cuobjdump on the cubin (in Triton's wheel) or from the AMD assembly's metadata, loads from PTX or
that assembly. What is held is that kernels build, spill nothing and load 128 bits at a time: not their speed.
"""

import argparse
import dataclasses
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.errors import TritonError

from unlearn_kernels.triton.launches import options
from unlearn_kernels.triton.variants import Variant, variants

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
}

MOST_REGISTERS = 72
"""The limit outside the Gram kernels. With it, 28 warps of 64 and 7 wavefronts of 8 are resident, enough to keep memory
busy."""

# cp.async copies to shared memory, 16 (0x10) bytes per thread.
WIDE_LOADS = {
    "ptx": re.compile(
        r"ld\.global[.\w:]*\.v(4\.[bfu]32|2\.[bfu]64|8\.[bfu]32)|cp\.async\.\w+\.shared\.global[^;]*, 0x10"
    ),
    "amdgcn": re.compile(r"\b(global|buffer|flat)_load_dwordx4\b"),
}


@dataclass(frozen=True)
class Row:
    """The compiler's figures for one build. Bytes are per thread; only the AMD compiler counts spills.

    wide_loads are the 128-bit loads in the code; `streams` tensors are to be read by them.
    """

    target: str
    kernel: str
    detail: str
    dtype: str
    streams: int
    registers: int = 0
    stack_bytes: int = 0
    local_bytes: int = 0
    spills: int | None = None
    wide_loads: int = 0
    error: str | None = None


def broken_limits(row: Row) -> list[str]:
    """Say what is wrong with a build; return an empty list if nothing is."""
    if row.error is not None:
        return [row.error]
    most = math.inf if row.kernel.startswith(("gram", "preconditioned")) else MOST_REGISTERS
    broken = {
        f"{row.registers} registers, at most {MOST_REGISTERS}": row.registers > most,
        f"{row.stack_bytes} bytes of stack": row.stack_bytes > 0,
        f"{row.local_bytes} bytes of local memory": row.local_bytes > 0,
        f"{row.spills} spills": bool(row.spills),
        f"{row.wide_loads} loads of 128 bits, of {row.streams} tensors": row.wide_loads < row.streams,
    }
    return [words for words, is_broken in broken.items() if is_broken]


def build(variant: Variant, target: str) -> Row:
    """Compile one variant down to the target's binary and read off the figures. A failure is recorded in the row."""
    row = Row(target, variant.kernel, variant.detail, variant.dtype, variant.streams)
    gpu = TARGETS[target]
    source = ASTSource(
        variant.function,
        {
            name: "constexpr" if name in variant.constants else variant.types[name]
            for name in variant.function.arg_names
        },
        dict(variant.constants),
        {place: [["tt.divisibility", 16]] for place in _places(variant)},
    )
    try:
        compiled = triton.compile(source, gpu, dict(options(variant.threads, warp_size=gpu.warp_size)))
    except (TritonError, RuntimeError) as error:
        return dataclasses.replace(row, error=f"does not build: {str(error).strip().splitlines()[-1]}")
    return dataclasses.replace(row, **(_read_cuda(compiled) if gpu.backend == "cuda" else _read_amd(compiled)))


def _places(variant: Variant) -> list[tuple[int, ...]]:
    """Return the indices of the arguments that are multiples of 16: one number, or two for each member of a tuple."""
    places: list[tuple[int, ...]] = []
    for at, name in enumerate(variant.function.arg_names):
        kind = variant.types.get(name, "")
        if name in variant.constants:
            continue
        if isinstance(kind, tuple):
            places += [(at, n) for n in range(len(kind))]
        elif kind.startswith("*") or name in variant.multiples_of_16:
            places.append((at,))
    return places


def _read_cuda(compiled: CompiledKernel) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return {
        "registers": _number(r"\bREG:(\d+)", usage),
        "stack_bytes": _number(r"\bSTACK:(\d+)", usage),
        "local_bytes": _number(r"\bLOCAL:(\d+)", usage),
        "wide_loads": len(WIDE_LOADS["ptx"].findall(compiled.asm["ptx"])),
    }


def _read_amd(compiled: CompiledKernel) -> dict[str, int]:
    assembly = compiled.asm["amdgcn"]
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", assembly),
        "stack_bytes": _number(r"\.private_segment_fixed_size:\s+(\d+)", assembly),
        "spills": _number(r"\.vgpr_spill_count:\s+(\d+)", assembly),
        "wide_loads": len(WIDE_LOADS["amdgcn"].findall(assembly)),
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's output has no {pattern!r}: update unlearn_kernels.aot")
    return int(found.group(1))


def main(arguments: Sequence[str] | None = None) -> int:
    every = list(variants())
    parser = argparse.ArgumentParser(prog="python -m unlearn_kernels.aot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this GPU; may be repeated")
    parser.add_argument("--kernel", action="append", choices=sorted({v.kernel for v in every}), help="only this kernel")
    parser.add_argument("--dtype", action="append", choices=sorted({v.dtype for v in every}), help="only this dtype")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    chosen = parser.parse_args(arguments)
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    wanted = [
        (target, variant)
        for target in chosen.target or TARGETS
        for variant in every
        if variant.kernel in (chosen.kernel or [variant.kernel]) and variant.dtype in (chosen.dtype or [variant.dtype])
    ]
    rows = []
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        # A cached result from another version of the compiler would prove nothing.
        knobs.cache.dir = folder
        for done, (target, variant) in enumerate(wanted, 1):
            print(
                f"{done}/{len(wanted)} {target} {variant.kernel} {variant.detail} {variant.dtype}",
                file=sys.stderr,
                flush=True,
            )
            rows.append(build(variant, target))
    print(_json(rows) if chosen.json else _table(rows))
    return 1 if any(broken_limits(row) for row in rows) else 0


def _json(rows: Sequence[Row]) -> str:
    listed = [dataclasses.asdict(row) | {"broken": broken_limits(row)} for row in rows]
    return json.dumps({"triton": triton.__version__, "builds": listed}, indent=1)


def _table(rows: Sequence[Row]) -> str:
    head = ["target", "kernel", "variant", "dtype", "registers", "stack", "local", "spills", "128-bit loads", "verdict"]
    cells = [
        [
            *(row.target, row.kernel, row.detail, row.dtype),
            *(str(row.registers), str(row.stack_bytes), str(row.local_bytes)),
            "-" if row.spills is None else str(row.spills),
            f"{row.wide_loads} of {row.streams}" if row.streams else f"{row.wide_loads} (none needed)",
            "; ".join(broken_limits(row)) or "ok",
        ]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in (head, *cells)) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in (head, *cells)]
    broken = sum(bool(broken_limits(row)) for row in rows)
    return "\n".join([*(line.rstrip() for line in lines), "", _summary(len(rows), broken)])


def _summary(builds: int, broken: int) -> str:
    return f"triton {triton.__version__}: {builds} builds, {broken} outside the limits"


if __name__ == "__main__":
    sys.exit(main())
