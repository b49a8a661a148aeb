"""One rank of `test_engine.py`: reads the cases, steps the sharded engine through each, writes what came of it.

DeepSpeed holds global state, so it lives in processes of its own, and one process group serves every case.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.comm import comm
from deepspeed.ops import __compatible_ops__
from torch import Tensor, nn

from expunge.settings import TrainingSettings
from expunge.unlearning.engine import ShardedEngine

Batch = tuple[Tensor, Tensor]


def steps(
    engine: ShardedEngine, network: nn.Module, batches: list[list[Batch]], rank: int, world: int
) -> list[dict[str, float | list[float]]]:
    """One engine step per entry; each objective is the mean square error on this rank's part of its batch."""
    records: list[dict[str, float | list[float]]] = []
    for step in batches:
        parts = [(x[rank::world], y[rank::world]) for x, y in step]
        losses, surgery = engine.step([lambda x=x, y=y: nn.functional.mse_loss(network(x), y) for x, y in parts])
        records.append({"losses": losses, "cosine": surgery.cosine, "conflict": surgery.conflict, "norm": surgery.norm})
    return records


def weights(network: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in network.parameters()]


def run(case: dict, folder: Path, rank: int, world: int) -> dict:
    training: TrainingSettings = case["training"]
    network: nn.Module = case["network"]()
    engine = ShardedEngine(network, training)
    half = len(case["batches"]) // 2
    records = steps(engine, network, case["batches"][:half], rank, world)
    engine.save(folder, half)
    records += steps(engine, network, case["batches"][half:], rank, world)

    fresh = case["network"]()
    resumed = ShardedEngine(fresh, training)
    done = resumed.load(folder)
    again = steps(resumed, fresh, case["batches"][done:], rank, world)
    return {
        "records": records,
        "weights": weights(network),
        "done": done,
        "resumed": weights(fresh),
        "resumed_records": again,
    }


def main(cases: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    results: dict[str, object] = {
        name: run(case, out / f"{name}-{world}", rank, world)
        for name, case in torch.load(cases, weights_only=False).items()
    }
    results["shm"] = (__compatible_ops__["deepspeed_shm_comm"], comm.cdb.shm_comm_op is not None)
    torch.save(results, out / f"world{world}-rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
