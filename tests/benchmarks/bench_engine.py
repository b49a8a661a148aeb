"""The sharded engine's cost beside the plain joint step: time, memory, and bytes on the wire. CSV rows on stdout.

    python -m tests.benchmarks.bench_engine [--steps 20] [--only overhead,memory,scaling] > engine.csv

`overhead`: a step with surgery against the joint step (the same micro-batches, gradients simply added), on the small
    SD3 (`flags`) with 2 workers; K = 1, and with LoRA K = 8 and 32. `plain` is the joint step as DeepSpeed does it,
    with its own reduction, norm and clip; `joint` has this engine's. An objective has `rows` samples; ways take turns.
`memory`: bytes that a rank keeps beside the gradient that it needs anyway, by ZeRO stage, counted; against the PCGrad
    loop as usually written, which holds K + 1 whole gradients and a copy of each on every rank; and peak RSS.
`scaling`: weak scaling: the same samples per worker on 1 and on 2 workers; bytes per step that a rank sends.

Each figure has its own process group, because DeepSpeed holds global state.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from expunge.settings import TrainingSettings

FIELDS: list[str] = [
    "bench",
    "way",
    "adapter",
    "stage",
    "workers",
    "objectives",
    "rows",
    "unit",
    "p20",
    "p50",
    "p80",
    "device",
    "torch",
]
REQUESTS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", default="overhead,memory,scaling")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _worker(json.loads(arguments.worker))
        return
    table = csv.DictWriter(sys.stdout, FIELDS)
    table.writeheader()
    for job in _jobs(arguments.only.split(","), arguments.steps):
        for row in _group(job):
            table.writerow({**row, "device": platform.machine(), "torch": torch.__version__})
            sys.stdout.flush()


def _jobs(only: list[str], steps: int) -> Iterator[dict[str, Any]]:
    common = {"steps": steps, "workers": 2, "stage": 1, "adapter": "lora", "objectives": 1, "rows": 8}
    if "overhead" in only:
        for rows in (8, 32):
            yield {**common, "bench": "overhead", "adapter": "full", "rows": rows}
        for objectives in (1, 8, 32):
            yield {**common, "bench": "overhead", "objectives": objectives}
    if "memory" in only:
        for adapter, objectives in (("full", 1), ("lora", 8)):
            for stage in (0, 1, 2, 3):
                yield {
                    **common,
                    "bench": "memory",
                    "adapter": adapter,
                    "objectives": objectives,
                    "stage": stage,
                    "steps": 3,
                }
    if "scaling" in only:
        for workers in (1, 2):
            yield {**common, "bench": "scaling", "workers": workers, "adapter": "full"}


def _group(job: dict[str, Any]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.benchmarks.bench_engine", "--worker"]
        job = {**job, "out": folder}
        started = []
        for rank in range(job["workers"]):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(job["workers"]),
                "LOCAL_SIZE": str(job["workers"]),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(20000 + os.getpid() % 10000),
                "OMP_NUM_THREADS": "1",
            }
            started.append(subprocess.Popen([*command, json.dumps(job)], env=environment, stdout=sys.stderr))
        if any([process.wait() for process in started]):
            raise SystemExit(f"a worker failed: {job}")
        return json.loads((Path(folder) / "rows.json").read_text())


def _worker(job: dict[str, Any]) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = {"overhead": _overhead, "memory": _memory, "scaling": _scaling}[job["bench"]](job)
    if dist.get_rank() == 0:
        keys = ("bench", "adapter", "stage", "workers", "objectives", "rows")
        (Path(job["out"]) / "rows.json").write_text(json.dumps([{**{k: job[k] for k in keys}, **row} for row in rows]))
    dist.destroy_process_group()


Step = Callable[[int], Any]


def _ways(job: dict[str, Any]) -> tuple[dict[str, Step], int]:
    """Return a step with surgery, two joint steps of the same samples, and the number of trained weights."""
    import torch.distributed as dist

    from expunge.families import load_model
    from expunge.preparation.dataset import ForgetSet, RetainSet
    from expunge.settings import Settings
    from expunge.unlearning.adapter import attach
    from expunge.unlearning.engine import ShardedEngine
    from expunge.unlearning.losses import Losses
    from expunge.unlearning.steps import Steps

    rank, world = dist.get_rank(), dist.get_world_size()
    objectives = job["objectives"]
    training = TrainingSettings.model_validate(
        {
            "adapter": job["adapter"],
            "zero_stage": job["stage"],
            "workers": world,
            "forget_batch": max(job["rows"], 2 * objectives) if job["bench"] != "scaling" else 8 * world,
            "retain_batch": job["rows"] if job["bench"] != "scaling" else 8 * world,
            "objectives_per_step": objectives,
        }
    )
    options = Settings.model_fields["models"].get_default(call_default_factory=True)["flags"]
    torch.manual_seed(0)
    model = load_model(options, options.resolution)
    frozen = attach(model, training, None)
    generator = torch.Generator().manual_seed(1)
    x_f, x_s, x_0 = (torch.randn(REQUESTS, *model.latent_shape, generator=generator) for _ in range(3))
    prompt = torch.zeros(REQUESTS, dtype=torch.long)
    request = torch.arange(REQUESTS) % max(objectives, 1)
    losses = Losses(model, frozen, training, model.condition(["a flag"]))
    sets = ForgetSet(x_f, x_s, prompt, request), RetainSet(x_0, prompt)
    steps = Steps(losses, training, *sets, "request" if objectives > 1 else "batch", rank, world)
    trained = sum(p.numel() for p in model.network.parameters() if p.requires_grad)
    engine = ShardedEngine(model.network, training)

    def surgery(step: int) -> Any:
        return engine.step(step, steps(step)[1])

    def joint(step: int) -> None:
        """Add up the gradients of the same micro-batches: one accumulation, one reduction."""
        engine._backward([one for objective in steps(step)[1] for one in objective])
        engine._gradients.wait()
        engine._engine.set_gradient_accumulation_boundary(True)
        engine._engine.step()

    def plain(step: int) -> None:
        """Do the same with DeepSpeed's own reduction, norm and clip: the step without this engine."""
        micro_batches = [one for objective in steps(step)[1] for one in objective]
        optimizer: Any = engine._engine.optimizer
        for index, micro_batch in enumerate(micro_batches):
            engine._gradients.before_forward()
            engine._engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            engine._engine.backward(micro_batch() / len(micro_batches), scale_wrt_gas=False)
        optimizer.compute_grad_norm, optimizer.clip_grad = True, training.clip
        engine._engine.step()
        optimizer.compute_grad_norm, optimizer.clip_grad = False, 0.0

    return {"surgery": surgery, "joint": joint, "plain": plain}, trained


def _overhead(job: dict[str, Any]) -> list[dict[str, Any]]:
    import torch.distributed as dist

    ways, _ = _ways(job)
    clocks: dict[str, Callable[[], float]] = {"s": time.perf_counter, "CPU s": time.process_time}
    times: dict[tuple[str, str], list[float]] = {(way, unit): [] for way in ways for unit in clocks}
    order = list(ways.items())
    for step in range(job["steps"] + 2):
        order = [*order[1:], order[0]]
        for way, run in order:
            dist.barrier()
            begun = {unit: clock() for unit, clock in clocks.items()}
            run(step)
            for unit, clock in clocks.items():
                times[way, unit].append(clock() - begun[unit])
    times = {key: values[2:] for key, values in times.items()}
    rows = [{"way": way, "unit": unit, **_quantiles(values)} for (way, unit), values in times.items()]
    for unit in clocks:
        for peer in ("joint", "plain"):
            ratios = [a / b for a, b in zip(times["surgery", unit], times[peer, unit], strict=True)]
            rows.append({"way": f"surgery / {peer}", "unit": f"ratio of {unit}", **_quantiles(ratios)})
    return rows


def _memory(job: dict[str, Any]) -> list[dict[str, Any]]:
    ways, trained = _ways(job)
    stashed = [ways["surgery"](step).stashed for step in range(job["steps"])]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024  # of this process alone, which ru_maxrss is not
    usual = (2 * (job["objectives"] + 1) - 1) * trained * 4
    return [
        {"way": "stash", "unit": "bytes", **_quantiles(stashed)},
        {"way": "PCGrad loop, arithmetic", "unit": "bytes", **_quantiles([usual])},
        {"way": "peak RSS", "unit": "bytes", **_quantiles([peak])},
    ]


def _scaling(job: dict[str, Any]) -> list[dict[str, Any]]:
    ways, _ = _ways(job)
    times, sent = [], []
    for step in range(job["steps"] + 2):
        with _counted() as count:
            begun = time.perf_counter()
            ways["surgery"](step)
            times.append(time.perf_counter() - begun)
        sent.append(count["bytes"])
    return [
        {"way": "step", "unit": "s", **_quantiles(times[2:])},
        {"way": "handed to collectives", "unit": "bytes", **_quantiles(sent[2:])},
    ]


@contextmanager
def _counted() -> Iterator[dict[str, float]]:
    """Count the bytes of tensors that this rank passes to collectives, including DeepSpeed's own."""
    import torch.distributed as dist

    count = {"bytes": 0.0}
    names = (
        "all_reduce",
        "all_to_all_single",
        "reduce",
        "broadcast",
        "all_gather",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
    )
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(*tensors: Any, **options: Any) -> Any:
            largest = [t.nbytes for t in [*tensors, *options.values()] if isinstance(t, torch.Tensor)]
            count["bytes"] += max(largest, default=0)
            return originals[name](*tensors, **options)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield count
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _quantiles(values: list[Any]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{q}": ordered[min(len(ordered) - 1, int(q / 100 * len(ordered)))] for q in (20, 50, 80)}


if __name__ == "__main__":
    main()
