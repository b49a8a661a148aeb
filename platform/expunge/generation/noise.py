"""The noise of a sample: a function of its own seed, whatever the batch, the worker or the device."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def seeded_noise(seeds: Tensor | Sequence[int], shape: Sequence[int]) -> Tensor:
    """Draw standard normal latents [N, *shape], float32 on the host; seeds: [N], each decides its own alone."""
    # Not torch's generator, which on a CPU looks at the lowest 32 bits of a seed only, and differs on a GPU.
    generators = (np.random.Generator(np.random.Philox(key=int(seed))) for seed in seeds)
    return torch.from_numpy(np.stack([each.standard_normal(tuple(shape), dtype=np.float32) for each in generators]))
