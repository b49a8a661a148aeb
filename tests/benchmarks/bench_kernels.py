"""Time, memory and error of `unlearn_kernels` beside its peers on the same tensors: `make bench-kernels`.

All run in turn within one process, so that a busy machine slows all alike: ratios are what can be compared between
machines and days. CPU time counts all threads. CSV on stdout, from which `--table CSV` makes the README's table.
"""

import argparse
import csv
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np
import torch

from tests.benchmarks import kernel_peers as peers
from unlearn_kernels import axpby_, gram, preconditioned_gram
from unlearn_kernels.backends import backend_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADER = ["what", "name", "dtype", "K", "elements", "threads", "figure", "p20", "p50", "p80", "unit"]
STAMP = ["device", "backend", "torch", "expunge"]


@dataclass(frozen=True)
class Row:
    what: str
    name: str
    dtype: str
    count: int
    elements: int
    threads: int
    figure: str
    values: list[float]
    unit: str

    @property
    def median(self) -> float:
        return float(np.median(self.values))

    def cells(self) -> list[object]:
        quantiles = [f"{q:.4g}" for q in np.quantile(self.values, [0.2, 0.5, 0.8])]
        key = [self.what, self.name, self.dtype, self.count, self.elements, self.threads, self.figure]
        return [*key, *quantiles, self.unit]


@dataclass(frozen=True)
class Contender:
    name: str
    run: Callable[[], object]


def interleaved(
    contenders: Sequence[Contender], repeats: int, reset: Callable[[], object], device: str = "cpu"
) -> dict[str, np.ndarray]:
    """Time each contender: milliseconds [repeats, 2], CPU and wall. A first turn warms up and compiles.

    On a GPU, wall time is from the start to the end of its work, gaps in which it waits for the host included.
    """
    clock = _GpuClock if device == "cuda" else _Clock
    times: dict[str, list[tuple[float, float]]] = {contender.name: [] for contender in contenders}
    gc.disable()  # as timeit does: a collection between two turns would cool the caches
    for repeat in range(repeats + 1):
        gc.collect()
        for contender in contenders:
            reset()
            wall, cpu = clock(), time.process_time()
            contender.run()
            cpu, wall = time.process_time() - cpu, wall.milliseconds()
            if repeat:
                times[contender.name].append((1e3 * cpu, wall))
    gc.enable()
    return {name: np.array(values) for name, values in times.items()}


class _Clock:
    """Runs from its creation on."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()

    def milliseconds(self) -> float:
        return 1e3 * (time.perf_counter() - self._begun)


class _GpuClock:
    """Runs on the GPU, from when all work before its creation has ended."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._begin.record()

    def milliseconds(self) -> float:
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end)


def _rows(what: str, dtype: str, count: int, elements: int, times: dict[str, np.ndarray]) -> Iterator[Row]:
    """Print the times of all, and the ratio of each peer to `ours`, turn by turn."""
    key = (dtype, count, elements, torch.get_num_threads())
    for name, values in times.items():
        for column, figure in enumerate(("cpu", "wall")):
            yield Row(what, name, *key, figure, list(values[:, column]), "ms")
            if name != "ours":
                yield Row(what, name, *key, f"{figure} / ours", list(values[:, column] / times["ours"][:, column]), "1")


def surgery(elements: int, dtype: str, repeats: int, device: str = "cpu") -> Iterator[Row]:
    """Time K = 2 in conflict, with eight tensors per gradient. The stream is torch adding one float32 to another."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(1024, max(1, elements // 8 // 1024))] * 8
    forget, start = (
        [torch.randn(s, generator=generator, device=device).to(DTYPES[dtype]) for s in shapes] for _ in range(2)
    )
    start = [s - f for s, f in zip(start, forget, strict=True)]
    retain = [gradient.clone() for gradient in start]
    moment = [torch.rand(s, generator=generator, device=device) for s in shapes]
    stream = [[torch.zeros(s, device=device) for s in shapes] for _ in range(2)]

    def reset() -> None:
        # Before each turn alike, so that all begin with the same write-backs pending.
        torch._foreach_copy_(retain, start)
        torch._foreach_zero_(stream[0])

    contenders = [
        Contender("ours", lambda: peers.ours(forget, retain)),
        Contender("eager", lambda: peers.eager(forget, retain)),
        Contender("foreach", lambda: peers.foreach(forget, retain)),
        Contender("compile", lambda: peers.compiled(forget, retain)),
        Contender("compile, by the Gram", lambda: peers.compiled_gram(forget, retain)),
        Contender("combine_ alone", lambda: axpby_(retain, 0.5, forget, 0.5)),
        Contender("gram alone", lambda: gram([forget, retain])),
        Contender(
            "preconditioned_gram alone",
            lambda: preconditioned_gram([forget, retain], moment, correction=0.5, eps=1e-8),
        ),
        Contender("fp32 stream", lambda: torch._foreach_add_(*stream, alpha=0.5)),
    ]
    times = interleaved(contenders, repeats, reset, device)
    yield from _rows("surgery", dtype, 2, elements, times)
    # Bytes a second, as a share of what the float32 stream moves: it reads two vectors and writes one.
    bandwidth = 3 * 4 * elements / times["fp32 stream"][:, 1]
    size = start[0].element_size()
    moved = {"ours": 5 * size, "combine_ alone": 3 * size, "gram alone": 2 * size, "fp32 stream": 12}
    key = (dtype, 2, elements, torch.get_num_threads())
    for name, each in moved.items():
        rate = each * elements / times[name][:, 1]  # bytes per millisecond
        yield Row("surgery", name, *key, "bandwidth", list(rate / 1e6), "GB/s")
        if name != "fp32 stream":
            yield Row("surgery", name, *key, "bandwidth / stream", list(rate / bandwidth), "1")


def many(count: int, elements: int, repeats: int, device: str = "cpu") -> Iterator[Row]:
    """Time K float32 gradients as the matrix that TorchJD expects. The usual loops, quadratic in K, end at K = 8."""
    start = torch.randn(count, elements, generator=torch.Generator(device).manual_seed(0), device=device)
    gradients = start.clone()
    contenders = [
        Contender("ours", lambda: peers.ours_matrix(gradients)),
        Contender("torchjd", lambda: peers.torchjd(gradients)),
    ]
    if count <= 8:
        contenders += [
            Contender("loop", lambda: peers.loop(gradients)),
            Contender("libmtl", lambda: peers.libmtl(gradients)),
        ]
    times = interleaved(contenders, repeats, lambda: gradients.copy_(start), device)
    yield from _rows("pcgrad", "fp32", count, elements, times)


def loss(shape: tuple[int, ...], dtype: str, repeats: int, device: str = "cpu") -> Iterator[Row]:
    """Time forward and backward of the three-tensor form; measure errors against float64 on the same tensors."""
    generator = torch.Generator(device).manual_seed(0)
    pred, *terms = (torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype]) for _ in range(4))
    sigma = torch.linspace(0.1, 0.9, shape[0], device=device)
    coefficients = torch.stack([torch.ones_like(sigma), 1 / sigma - 1, -1 / sigma], 1)
    weight = sigma**2
    pred.requires_grad_()

    def step(function: peers.Loss) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(pred, terms, coefficients, weight), pred)

    functions = {
        "ours": peers.our_loss,
        "eager": peers.eager_loss,
        "eager, own dtype": peers.narrow_loss,
        "compile": peers.compiled_loss,
    }
    contenders = [Contender(name, step(function)) for name, function in functions.items()]
    yield from _rows("loss", dtype, 1, pred.numel(), interleaved(contenders, repeats, lambda: None, device))
    with torch.no_grad():
        exact = peers.eager_loss(pred.double(), [t.double() for t in terms], coefficients.double(), weight.double())
        for name, function in functions.items():
            error = abs(function(pred, terms, coefficients, weight).double() / exact - 1).item()
            yield Row("loss", name, dtype, 1, pred.numel(), torch.get_num_threads(), "relative error", [error], "1")


PEAK = """
import re, sys, torch
from pathlib import Path
from tests.benchmarks import kernel_peers as peers
def peak():  # of this process alone; ru_maxrss starts with that of the parent
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
torch.set_num_threads(1)
size = 40_000_000
forget, retain = [torch.ones(size)], [torch.full((size,), -1.0)]
function = getattr(peers, sys.argv[1])
function([torch.ones(1000)], [-torch.ones(1000)])
Path("/proc/self/clear_refs").write_text("5")
before = peak()
function(forget, retain)
print((peak() - before) / (4 * size))
"""


def memory() -> Iterator[Row]:
    """Measure the peak memory of one surgery beyond its two gradients, in vectors of N, each in a separate process."""
    for name, function in (("ours", "ours"), ("eager", "eager"), ("foreach", "foreach"), ("loop", "loop_of_lists")):
        run = subprocess.run([sys.executable, "-c", PEAK, function], capture_output=True, text=True, check=True)
        yield Row("memory", name, "fp32", 2, 40_000_000, 1, "extra vectors", [float(run.stdout)], "N")


def measure(args: argparse.Namespace) -> Iterator[Row]:
    for threads in args.threads:
        torch.set_num_threads(threads)
        torch._dynamo.reset()
        for elements, dtype in product(args.sizes, DTYPES):
            yield from surgery(elements, dtype, args.repeats if elements <= 50_000_000 else max(3, args.repeats // 3))
        for dtype in DTYPES:
            yield from loss((8, 16, 128, 128), dtype, 3 * args.repeats)
        for count in args.counts:
            elements = 20_000_000 if count <= 4 else 10_000_000 if count <= 8 else 5_000_000
            yield from many(count, int(elements * args.scale), max(3, args.repeats // 2))
    yield from memory()


ASIDE = ("fp32 stream", "combine_ alone", "gram alone", "preconditioned_gram alone")


def table(file: Path) -> Iterator[str]:
    """Print the README's table from the CSV of an earlier run: medians of the ratios, turn by turn."""
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    ratios = {
        (r["what"], r["dtype"], r["K"], r["elements"], r["name"], r["threads"], r["figure"]): float(r["p50"])
        for r in rows
        if r["name"] not in ASIDE
    }
    yield "| case | peer | CPU time of the peer / ours, one thread | two threads | wall time, two threads |"
    yield "|---|---|---|---|---|"
    for what, dtype, count, elements, name, threads, figure in ratios:
        if (threads, figure) == ("1", "cpu / ours"):
            key = (what, dtype, count, elements, name)
            values = [ratios.get((*key, t, f)) for t, f in (("1", figure), ("2", figure), ("2", "wall / ours"))]
            case = f"{what} {dtype}, K = {count}, {float(elements) / 1e6:.3g}M"
            yield f"| {case} | {name} | " + " | ".join("-" if v is None else f"{v:.1f}" for v in values) + " |"
    yield ""
    for row in rows:
        if row["figure"] in ("bandwidth / stream", "relative error", "extra vectors"):
            case = f"{row['what']} {row['dtype']} {float(row['elements']) / 1e6:.3g}M, {row['threads']} threads"
            yield f"- {case}: {row['name']}, {row['figure']} {float(row['p50']):.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20_000_000, 200_000_000], help="elements, K = 2")
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="K of the PCGrad comparison")
    parser.add_argument("--scale", type=float, default=1.0, help="of the sizes of the PCGrad comparison")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--table", type=Path, metavar="CSV", help="print the README's table of an earlier run")
    args = parser.parse_args()
    if args.table:
        print("\n".join(table(args.table)))
        return
    stamp = ["cpu", backend_name([torch.ones(1)]), torch.__version__, version("expunge")]
    rows = csv.writer(sys.stdout, lineterminator="\n")
    rows.writerow([*HEADER, *STAMP])
    for row in measure(args):
        rows.writerow([*row.cells(), *stamp])
        sys.stdout.flush()


if __name__ == "__main__":
    main()
