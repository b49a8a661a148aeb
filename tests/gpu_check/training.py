"""How fast SD3-medium trains: steps per second of the engine on one rank, and its peak memory beside the plan's."""

import json
import time

import torch
import torch.distributed as dist

from expunge.preparation.dataset import ForgetSet, RetainSet
from expunge.settings import TrainingSettings
from expunge.unlearning.adapter import attach
from expunge.unlearning.engine import ShardedEngine
from expunge.unlearning.losses import Losses
from expunge.unlearning.memory import estimate, footprint_of
from expunge.unlearning.steps import Steps
from tests.device import BACKEND, DEVICE
from tests.gpu_check import options
from tests.gpu_check.models import Bare, architecture, peak_bytes, reset_peak, synchronise

FORGET, RETAIN, MICRO_BATCH = 2, 4, 2
WARM_UP, STEPS = 2, 5


def settings() -> TrainingSettings:
    return TrainingSettings.model_validate(
        {
            "adapter": "lora",
            "workers": 1,
            "precision": "bf16",
            "zero_stage": 1,
            "activation_checkpointing": True,
            "forget_batch": FORGET,
            "retain_batch": RETAIN,
            "micro_batch": MICRO_BATCH,
            "objectives": "batch",
        }
    )


def measure(side: int, tiny: bool) -> dict[str, object]:
    training = settings()
    model = Bare(side, DEVICE, tiny=tiny)
    frozen = attach(model, training, None)
    losses = Losses(model, frozen, training, model.prompts(1), DEVICE)
    x_f, x_s = model.latents(2, 1), model.latents(2, 2)
    forget = ForgetSet(x_f, x_s, torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long))
    retain = RetainSet(model.latents(4, 3), torch.zeros(4, dtype=torch.long))
    steps = Steps(losses, training, forget, retain, "batch", 0, 1)
    engine = ShardedEngine(model.network, training)
    reset_peak(DEVICE)
    for number in range(WARM_UP):
        _step(engine, steps, number)
    synchronise(model)
    begun = time.perf_counter()
    for number in range(WARM_UP, WARM_UP + STEPS):
        _step(engine, steps, number)
    synchronise(model)
    seconds = time.perf_counter() - begun
    counted = footprint_of(lambda: architecture(side, tiny=tiny), training, MICRO_BATCH)
    planned = estimate(counted, training.zero_stage, "batch", gpus=1, requests=1).total
    return {
        "resolution": side,
        "adapter": training.adapter,
        "forget_batch": FORGET,
        "retain_batch": RETAIN,
        "micro_batch": MICRO_BATCH,
        "activation_checkpointing": training.activation_checkpointing,
        "steps": STEPS,
        "seconds": seconds,
        "steps_per_second": STEPS / seconds,
        "planned_bytes": planned,
        "peak_bytes": peak_bytes(DEVICE),
    }


def _step(engine: ShardedEngine, steps: Steps, number: int) -> None:
    done = engine.step(number, steps(number)[1])
    if done.bad:
        raise SystemExit(f"the objectives {done.bad} are not finite in step {number}")


def main() -> None:
    arguments = options.read(__doc__)
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = measure(arguments.side, arguments.tiny)
    finally:
        dist.destroy_process_group()
    arguments.out.write_text(json.dumps({"backend": BACKEND, **found}))


if __name__ == "__main__":
    main()
