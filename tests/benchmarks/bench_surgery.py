"""Time of one gradient surgery: `gram` and `combine_` beside the eager PCGrad that public code uses.

`python -m tests.benchmarks.bench_surgery --size 2000000 --repeats 15` prints CSV: milliseconds of one surgery, and
`ratio` rows with eager time / ours. Both run in turn within one process, so that a busy machine slows both alike: the
ratio is what can be compared between machines and days.
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from unlearn_kernels import clip_coefficient, combine_, gram, retain_normal

MAX_NORM = 1.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def eager_pcgrad(forget: list[Tensor], retain: list[Tensor]) -> None:
    """Concatenate, dot, project, clip, write back: one forget gradient against the retain gradient."""
    f, r = torch.cat([g.flatten() for g in forget]), torch.cat([g.flatten() for g in retain])
    dot = torch.dot(f, r)
    if dot < 0:
        f = f - dot / torch.dot(r, r) * r
    total = f + r
    total = total * torch.clamp(MAX_NORM / torch.linalg.vector_norm(total), max=1.0)
    for gradient, part in zip(retain, total.split([g.numel() for g in retain]), strict=True):
        gradient.copy_(part.view_as(gradient))


def ours(forget: list[Tensor], retain: list[Tensor]) -> None:
    matrix = gram([forget, retain])
    coefficients = retain_normal(matrix)
    combine_(retain, [forget, retain], coefficients * clip_coefficient(matrix, coefficients, MAX_NORM))


def gradients(size: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    """A network's worth of tensors: square layers with their biases."""
    width = 256
    shapes = [(width, width), (width,)] * max(1, size // (width * width + width))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def measure(size: int, dtype: torch.dtype, repeats: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each repeat: eager, ours. One of each first, to warm up."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        generator = torch.Generator().manual_seed(repeat)
        forget, retain = gradients(size, dtype, generator), gradients(size, dtype, generator)
        for surgery, collected in zip((eager_pcgrad, ours), times, strict=True):
            elapsed = _milliseconds(surgery, forget, [gradient.clone() for gradient in retain])
            if repeat:
                collected.append(elapsed)
    return times


def _milliseconds(surgery: Callable[[list[Tensor], list[Tensor]], None], f: list[Tensor], r: list[Tensor]) -> float:
    start = time.perf_counter()
    surgery(f, r)
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2_000_000, help="elements of one gradient")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    rows = csv.writer(sys.stdout, lineterminator="\n")
    rows.writerow(["what", "dtype", "elements", "p20", "p50", "p80", "unit", "device", "threads", "torch"])
    for name, dtype in DTYPES.items():
        eager, here = measure(args.size, dtype, args.repeats)
        ratio = [a / b for a, b in zip(eager, here, strict=True)]
        for what, values, unit in (("eager", eager, "ms"), ("reference", here, "ms"), ("ratio", ratio, "1")):
            quantiles = [f"{q:.3f}" for q in np.quantile(values, [0.2, 0.5, 0.8])]
            rows.writerow([what, name, args.size, *quantiles, unit, "cpu", torch.get_num_threads(), torch.__version__])


if __name__ == "__main__":
    main()
