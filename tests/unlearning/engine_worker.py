"""One rank of `test_engine.py`: takes the sharded engine through variants, and writes down the results.

DeepSpeed holds global state, so it runs in separate processes, and one process group serves many variants.
"""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.comm import comm
from deepspeed.ops import __compatible_ops__
from torch import Tensor, nn

from expunge.unlearning.engine import ShardedEngine, geometry, stages
from tests.device import BACKEND, DEVICE
from tests.unlearning.engine_cases import CASES, STEPS, VARIANTS, WARM_UP, Batch, Record, Variant, loss_of
from tests.unlearning.groups import leave


def micro(
    step: list[Batch], network: nn.Module, rank: int, world: int, variant: Variant
) -> list[list[Callable[[], Tensor]]]:
    """For each objective, cut this rank's part of the batch into micro-batches."""
    count = variant.micro_batches
    return [
        [
            lambda x=x, y=y, k=k: loss_of(variant.case, network, k, (x.to(DEVICE), y.to(DEVICE)))
            for x, y in zip(wide[rank::world].chunk(count), narrow[rank::world].chunk(count), strict=True)
        ]
        for k, (wide, narrow) in enumerate(step)
    ]


def steps(
    engine: ShardedEngine,
    network: nn.Module,
    batches: list[list[Batch]],
    rank: int,
    world: int,
    variant: Variant,
    first: int = 0,
) -> list[Record]:
    """Make one engine step per entry; an objective is the mean squared error on this rank's part of the batch."""
    records: list[Record] = []
    for number, step in enumerate(batches, first):
        done = engine.step(number, micro(step, network, rank, world, variant))
        records.append(
            {
                "losses": done.losses,
                "cosine": done.cosine,
                "conflict": done.conflict,
                "norm": done.norm,
                "stashed": done.stashed,
            }
        )
    return records


def skip(
    engine: ShardedEngine, network: nn.Module, step: list[Batch], rank: int, world: int, variant: Variant, bad: int
) -> tuple[int, ...]:
    """Try a step in which the last rank has a NaN in objective `bad`; return the objectives that were found bad."""
    poisoned = [(x, y.clone()) for x, y in step]
    poisoned[bad][1][-1] = float("nan")
    return engine.step(0, micro(poisoned, network, rank, world, variant)).bad


def elastic(variant: Variant, folder: Path, rank: int, world: int) -> list[Tensor]:
    """Go on from a checkpoint of another number of ranks; return the final weights."""
    case = CASES[variant.case]
    network = case.network()
    engine = ShardedEngine(network, variant.settings())
    done = engine.load(folder)
    steps(engine, network, case.batches()[done:], rank, world, variant, done)
    return weights(network, variant.stage)


def weights(network: nn.Module, stage: int) -> list[Tensor]:
    """Copy every parameter, including frozen ones, in float32."""
    parameters = list(network.parameters())
    with deepspeed.zero.GatheredParameters(parameters) if stage == 3 else nullcontext():
        return [p.detach().float().to("cpu", copy=True) for p in parameters]


def run(variant: Variant, folder: Path, rank: int, world: int) -> dict[str, object]:
    case = CASES[variant.case]
    training = variant.settings()
    network, batches = case.network(), case.batches()
    engine = ShardedEngine(network, training)
    begin, half = engine.weights(), STEPS // 2
    records = steps(engine, network, batches[:half], rank, world, variant)
    engine.save(folder, half)
    records += steps(engine, network, batches[half:], rank, world, variant, half)

    moved = engine.distance_from(begin)

    fresh = case.network()
    resumed = ShardedEngine(fresh, training)
    done = resumed.load(folder)
    bad = [skip(resumed, fresh, batches[done], rank, world, variant, k) for k in range(len(case.signs))]
    again = steps(resumed, fresh, batches[done:], rank, world, variant, done)
    final = weights(network, variant.stage)
    engine.consolidate()
    return {
        "records": records,
        "moved": moved,
        "weights": final,
        "whole": [p.detach().to("cpu", copy=True) for p in network.parameters() if p.requires_grad]
        if rank == 0
        else [],
        "done": done,
        "bad": bad,
        "resumed": weights(fresh, variant.stage),
        "resumed_records": again,
        "offload": engine._engine.zero_cpu_offload(),
    }


def main(out: Path, label: str, names: str, others: str) -> None:
    """Run variants, and go on with others that another number of ranks has run; both are JSON lists of names."""
    torch.set_num_threads(1)
    stages.BUCKET = 16  # several per gradient, as on a large network
    geometry.WARM_UP = WARM_UP
    dist.init_process_group(BACKEND)
    rank, world = dist.get_rank(), dist.get_world_size()
    results: dict[str, object] = {
        "run": {name: run(VARIANTS[name], out / f"{name}-{world}", rank, world) for name in json.loads(names)},
        "elastic": {
            name: elastic(VARIANTS[name], out / f"{name}-{3 - world}", rank, world) for name in json.loads(others)
        },
        "shm": (__compatible_ops__["deepspeed_shm_comm"], comm.cdb.shm_comm_op is not None),
    }
    torch.save(results, out / f"{label}-rank{rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
