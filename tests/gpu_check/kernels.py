"""The benchmarks of `bench_kernels` on the device of the check, with the bandwidth that the kernels reach."""

import argparse
import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from tests.benchmarks.bench_kernels import DTYPES, Row, loss, many, surgery
from tests.device import DEVICE
from unlearn_kernels.backends import backend_name


def rows(tiny: bool) -> Iterator[Row]:
    sizes, shape = ([100_000], (2, 4, 8, 8)) if tiny else ([20_000_000, 200_000_000], (8, 16, 128, 128))
    repeats = 1 if tiny else 20
    for dtype in DTYPES:
        for elements in sizes:
            yield from surgery(elements, dtype, repeats, DEVICE)
        yield from loss(shape, dtype, 3 * repeats, DEVICE)
    if find_spec("torchjd") is None:
        return
    for count in (2,) if tiny else (2, 4, 8, 16, 32):
        yield from many(count, 10_000 if tiny else 5_000_000, repeats, DEVICE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    backend = backend_name([torch.ones(1, device=DEVICE)])
    if DEVICE == "cuda" and backend != "triton":
        sys.exit(f"the {backend} backend would run, not triton: is there a C compiler for its launchers?")
    found = [
        {
            "what": row.what,
            "name": row.name,
            "dtype": row.dtype,
            "K": row.count,
            "elements": row.elements,
            "figure": row.figure,
            "median": row.median,
            "unit": row.unit,
        }
        for row in rows(arguments.tiny)
        if not row.figure.startswith("cpu")
    ]
    arguments.out.write_text(
        json.dumps({"backend": backend, "torchjd": find_spec("torchjd") is not None, "rows": found})
    )


if __name__ == "__main__":
    main()
