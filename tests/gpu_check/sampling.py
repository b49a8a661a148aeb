"""How fast SD3-medium samples: passes per second through `generation`'s own sampler, with guidance, and its memory."""

import json
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from expunge.generation.noise import seeded_noise
from expunge.generation.sampling import Items, Sampler
from tests.device import DEVICE
from tests.gpu_check import options
from tests.gpu_check.models import DTYPE, Bare, architecture, peak_bytes, reset_peak, synchronise

STEPS = 4
ROUNDS = 2


def measure(side: int, tiny: bool) -> dict[str, object]:
    model = Bare(side, DEVICE, tiny=tiny)
    reset_peak(DEVICE)
    sampler = Sampler(model, model.prompts(2), model.prompts(1), guidance=5.0, most=2 if tiny else 16)
    _sample(model, sampler, sampler.batch)  # warms up, and finds the batch that fits
    count = ROUNDS * sampler.batch
    synchronise(model)
    begun = time.perf_counter()
    _sample(model, sampler, count)
    synchronise(model)
    seconds = time.perf_counter() - begun
    calls = 2 * STEPS * count  # guidance asks the network with and without the prompt
    operations = operations_per_call(side, tiny)
    return {
        "resolution": side,
        "items_per_pass": sampler.batch,
        "calls": calls,
        "seconds": seconds,
        "calls_per_second": calls / seconds,
        "operations_per_call": operations,
        "tflops": operations * calls / seconds / 1e12,
        "peak_bytes": peak_bytes(DEVICE),
    }


def _sample(model: Bare, sampler: Sampler, count: int) -> None:
    seeds = torch.arange(count)
    made = sampler(
        Items(torch.arange(count) % 2, lambda index: seeded_noise(seeds[index], model.latent_shape), steps=STEPS)
    )
    if not made.isfinite().all():
        raise SystemExit("a sample is not finite")


def operations_per_call(side: int, tiny: bool) -> int:
    """Count the floating-point operations of one sample in one pass, on the meta device."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        architecture(side, tiny=tiny).call(1, torch.float32)
    return counter.get_total_flops()


def main() -> None:
    arguments = options.read(__doc__)
    arguments.out.write_text(json.dumps({"dtype": str(DTYPE), **measure(arguments.side, arguments.tiny)}))


if __name__ == "__main__":
    main()
