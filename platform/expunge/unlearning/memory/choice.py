"""Which ZeRO stage, and which kind of forget gradients, a GPU has room for."""

from expunge.settings import TrainingSettings
from expunge.unlearning.memory.estimate import Estimate, estimate
from expunge.unlearning.memory.footprint import Footprint
from expunge.unlearning.objectives import Mode


def choose(options: list[Estimate], gpu_bytes: int) -> Estimate | None:
    """Prefer gradients per request if any stage holds them, then the lowest stage from 1 on; None if nothing fits.

    Stage 0 is left out: it replicates the optimizer and saves no communication against stage 1.
    """
    fitting = [option for option in options if option.stage >= 1 and option.fits(gpu_bytes)]
    return min(fitting, key=lambda option: (option.objectives != "request", option.stage), default=None)


def objectives_that_fit(
    footprint: Footprint, training: TrainingSettings, *, gpus: int, requests: int, gpu_bytes: int
) -> Mode:
    """Decide what `objectives = "auto"` means: a gradient per request if that costs no more samples and they all fit.

    Every worker takes part in each gradient: more of them than a worker has forget samples would add samples.
    """
    if requests > training.forget_batch // training.workers:
        return "batch"
    stage, offload = training.zero_stage, training.offload_optimizer
    apart = estimate(footprint, stage, "request", gpus=gpus, requests=requests, offload=offload)
    return "request" if apart.fits(gpu_bytes) else "batch"
