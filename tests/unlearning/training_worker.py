"""One rank of `test_training.py`: takes real steps of the shipped models, and exports the result."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from expunge.unlearning.adapter import export
from expunge.unlearning.engine import ShardedEngine
from tests.unlearning.groups import leave
from tests.unlearning.training_cases import STEPS, VARIANTS, Variant, load, steps_of


def run(variant: Variant, folder: Path, rank: int, world: int) -> dict[str, object]:
    model, training = load(variant.job), variant.training
    step_of = steps_of(model, training, rank, world)
    start = {name: p.detach().clone() for name, p in model.network.named_parameters() if p.requires_grad}
    engine = ShardedEngine(model.network, training)
    records = []
    for step in range(STEPS):
        done = engine.step(step, step_of(step)[1])
        records.append({"losses": done.losses, "cosine": done.cosine, "conflict": done.conflict, "norm": done.norm})
    engine.consolidate()
    if rank > 0:
        return {"records": records}
    hotfix = export(model, training, folder, variant.job, steps=training.steps)
    whole = {name: p.detach() for name, p in model.network.named_parameters() if name in start}
    return {"records": records, "moved": {name: whole[name] - start[name] for name in start}, "hotfix": hotfix}


def main(out: Path, names: str) -> None:
    """Run the variants in the JSON list `names`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    results = {name: run(VARIANTS[name], out / f"{name}-{world}", rank, world) for name in json.loads(names)}
    torch.save(results, out / f"world{world}-rank{rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
