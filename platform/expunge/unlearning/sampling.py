"""Who is sampled at a step, when, with which noise: functions of (seed, step, sample index), never of the rank.

So the number of workers changes nothing but rounding, and a resumed run repeats what it would have drawn. With an
adaptive budget, what each request misses has a say in who is sampled.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from expunge.families.base import DiffusionModel
from expunge.settings import TrainingSettings

Stream = Literal["forget", "retain", "request", "row", "probe"]
_STREAMS: dict[Stream, int] = {"forget": 1, "retain": 2, "request": 3, "row": 4, "probe": 5}

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Draw:
    """One worker's part of a step's batch: its sample indices are `rank, rank + world, ...`."""

    rows: Tensor
    """int64 [b]: rows of the prepared set."""
    time: Tensor
    """[b], in the model's unit of time."""
    noise: Tensor
    """float32 [b, C, H, W]."""


def draw_samples(
    model: DiffusionModel, training: TrainingSettings, stream: Stream, step: int, rows: Tensor, mine: Tensor
) -> Draw:
    """The samples `mine` [b] of a step whose samples are made from `rows` [n]."""
    batch = len(rows)
    generator = _generator(training.seed, stream, step, 0)
    # Stratified over the global batch, in random order: one time from each of `batch` equal slices of the density.
    u = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
    time = _time(model, training, u[mine])
    shape = model.latent_shape
    noise = torch.stack(
        [torch.randn(shape, generator=_generator(training.seed, stream, step, 1 + int(i))) for i in mine]
    )
    return Draw(rows[mine], time, noise)


def draw_probe(model: DiffusionModel, training: TrainingSettings, rows: Tensor, level: Tensor) -> Draw:
    """`rows` [b] at noise levels `level` [b]: a row has one noise, the same whenever it is asked about."""
    shape = model.latent_shape
    noise = [torch.randn(shape, generator=_generator(training.seed, "probe", 0, int(row))) for row in rows]
    return Draw(rows, model.time_at(level), torch.stack(noise))


def _time(model: DiffusionModel, training: TrainingSettings, u: Tensor) -> Tensor:
    """Times at the quantiles `u` of the sampling density, which is no loss weight: it says where, not how much."""
    match training.density:
        case "uniform":
            return model.time_from_uniform(u)
        case "logit_normal":
            centre, width = 0.0, 1.0
        case "band":
            centre, width = torch.logit(torch.tensor(training.band_level)).item(), training.band_width
    # log(b / a) = logit(level), so a normal in log(b / a) is a logit-normal in the level.
    level = torch.sigmoid(centre + width * torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))
    return model.time_at(level)


def pick(seed: int, stream: Stream, step: int, size: int, batch: int) -> Tensor:
    """int64 [batch]: sample p = step * batch + i takes row p of endless shuffled epochs: all come equally often."""
    position = step * batch + torch.arange(batch)
    epochs = {int(e): shuffled(seed, stream, int(e), size) for e in (position // size).unique()}
    return torch.stack([epochs[int(p // size)][p % size] for p in position])


def pick_by_weight(weight: Tensor, positions: Tensor) -> Tensor:
    """int64 [n]: which of K takes each of `positions` int64 [n], by `weight` float64 [K] >= 0, of which one is above 0.

    Steps of the golden ratio around the circle, of which each of the K has its share: among any consecutive positions,
    however many, all come close to as often as they are due. None is passed over for long, as it would be if each
    step rounded shares below one sample on its own; and a weight of 0 is never met.
    """
    share = weight.cumsum(0)
    return torch.searchsorted(share / share[-1], positions.double() * GOLDEN % 1, right=True)


def shuffled(seed: int, stream: Stream, epoch: int, size: int, what: int = 0) -> Tensor:
    """int64 [size]: the order of an epoch; `what` tells apart several sets of one stream."""
    return torch.randperm(size, generator=_generator(seed, stream, -1 - what, epoch))


def _generator(seed: int, stream: Stream, step: int, index: int) -> torch.Generator:
    """A generator of its own per (seed, stream, step, index): the words are mixed as splitmix64 does."""
    state = 0
    for word in (seed, _STREAMS[stream], step, index):
        state = (state + word + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state >> 1)
