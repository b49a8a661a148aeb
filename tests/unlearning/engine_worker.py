"""One rank of `test_engine.py`: steps the sharded engine through every variant, and writes what came of it.

DeepSpeed holds global state, so it lives in processes of its own, and one process group serves every variant.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.comm import comm
from deepspeed.ops import __compatible_ops__
from torch import Tensor, nn

from expunge.unlearning.engine import ShardedEngine
from tests.unlearning.engine_cases import CASES, STEPS, VARIANTS, Batch, Record, Variant, loss_of


def steps(
    engine: ShardedEngine, network: nn.Module, batches: list[list[Batch]], rank: int, world: int, variant: Variant
) -> list[Record]:
    """One engine step per entry; each objective is the mean square error on this rank's part of its batch."""
    records: list[Record] = []
    count = variant.micro_batches
    for step in batches:
        objectives = [
            [
                lambda x=x, y=y, k=k: loss_of(variant.case, network, k, (x, y))
                for x, y in zip(wide[rank::world].chunk(count), narrow[rank::world].chunk(count), strict=True)
            ]
            for k, (wide, narrow) in enumerate(step)
        ]
        done = engine.step(objectives)
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


def weights(engine: ShardedEngine, network: nn.Module) -> list[Tensor]:
    """Of every parameter, frozen ones too, in float32."""
    parameters = list(network.parameters())
    with engine.gathered(parameters):
        return [p.detach().float().clone() for p in parameters]


def run(variant: Variant, folder: Path, rank: int, world: int) -> dict[str, object]:
    case = CASES[variant.case]
    training = case.settings(zero_stage=variant.stage, precision=variant.precision)
    network, batches = case.network(), case.batches()
    engine = ShardedEngine(network, training)
    begin, half = engine.weights(), STEPS // 2
    records = steps(engine, network, batches[:half], rank, world, variant)
    engine.save(folder, half)
    records += steps(engine, network, batches[half:], rank, world, variant)

    moved = engine.distance_from(begin)

    fresh = case.network()
    resumed = ShardedEngine(fresh, training)
    done = resumed.load(folder)
    again = steps(resumed, fresh, batches[done:], rank, world, variant)
    final = weights(engine, network)
    engine.consolidate()
    return {
        "records": records,
        "moved": moved,
        "weights": final,
        "whole": [p.detach().clone() for p in network.parameters() if p.requires_grad] if rank == 0 else [],
        "done": done,
        "resumed": weights(resumed, fresh),
        "resumed_records": again,
    }


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    results: dict[str, object] = {
        name: run(variant, out / f"{name}-{world}", rank, world) for name, variant in VARIANTS.items()
    }
    results["shm"] = (__compatible_ops__["deepspeed_shm_comm"], comm.cdb.shm_comm_op is not None)
    torch.save(results, out / f"world{world}-rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
