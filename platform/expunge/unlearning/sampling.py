"""Which rows are sampled at a step, at which times and with which noise.

All of this depends on (seed, step, sample index) and never on the rank. So the number of workers changes nothing but
rounding, and a resumed run draws what it would have drawn. With an adaptive budget the choice of rows also depends on
how far each request still has to go.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from expunge.families.base import DiffusionModel
from expunge.settings import MethodSettings

Stream = Literal["forget", "retain", "request", "row", "probe"]
_STREAMS: dict[Stream, int] = {"forget": 1, "retain": 2, "request": 3, "row": 4, "probe": 5}

GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Draw:
    """One worker's part of a step's samples: those with the indices `rank, rank + world, ...`."""

    rows: Tensor
    """int64 [b]: rows of the prepared set."""
    time: Tensor
    """[b], in the model's unit of time."""
    noise: Tensor
    """float32 [b, C, H, W]."""


def draw_samples(
    model: DiffusionModel, method: MethodSettings, stream: Stream, step: int, rows: Tensor, mine: Tensor
) -> Draw:
    """Draw the samples `mine` [b] of a step whose samples are made from `rows` [n]."""
    batch = len(rows)
    generator = _generator(method.seed, stream, step, 0)
    # Stratified over the global batch in random order: one time from each of `batch` equal slices of the density.
    u = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
    # What must not change is kept at every noise level, and what must change, where the model shows it.
    time = _time(model, method, u[mine]) if stream == "forget" else model.time_from_uniform(u[mine])
    shape = model.latent_shape
    noise = torch.stack([torch.randn(shape, generator=_generator(method.seed, stream, step, 1 + int(i))) for i in mine])
    return Draw(rows[mine], time, noise)


def draw_probe(model: DiffusionModel, method: MethodSettings, rows: Tensor, level: Tensor) -> Draw:
    """Draw `rows` [b] at noise levels `level` [b]. A row has one noise, the same in every probe."""
    shape = model.latent_shape
    noise = [torch.randn(shape, generator=_generator(method.seed, "probe", 0, int(row))) for row in rows]
    return Draw(rows, model.time_at(level), torch.stack(noise))


def _time(model: DiffusionModel, method: MethodSettings, u: Tensor) -> Tensor:
    """Return the times at quantiles `u` of the sampling density, which says where to sample, not how much it counts."""
    match method.density:
        case "uniform":
            return model.time_from_uniform(u)
        case "logit_normal":
            centre, width = 0.0, 1.0
        case "band" | "memory":
            centre, width = torch.logit(torch.tensor(method.band_level)).item(), method.band_width
    # log(b / a) = logit(level), so a normal in log(b / a) is a logit-normal in the level.
    level = torch.sigmoid(centre + width * torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)))
    return model.time_at(level)


def pick(seed: int, stream: Stream, step: int, size: int, batch: int) -> Tensor:
    """Return the rows of a step's samples, int64 [batch], so that all of `size` rows come equally often.

    The samples of all steps are counted through, and number n takes row n of endless shuffled epochs.
    """
    return deal(seed, stream, size, numbers(step, batch))


def numbers(step: int, count: int) -> Tensor:
    """Return the numbers of a step's samples, counted from the start of the training: int64 [count]."""
    return step * count + torch.arange(count)


def deal(seed: int, stream: Stream, size: int, number: Tensor, what: int = 0) -> Tensor:
    """Return the row that each sample number takes from endless shuffled epochs of `size` rows: int64, as `number`."""
    epochs = {int(e): shuffled(seed, stream, int(e), size, what) for e in (number // size).unique()}
    return torch.stack([epochs[int(n // size)][n % size] for n in number])


def pick_by_weight(weight: Tensor, number: Tensor) -> Tensor:
    """Return which of K takes each sample number, int64 [n], in proportion to `weight`, float64 [K].

    Weights must be at least 0, and one must be above 0. The samples step around a circle by the golden ratio, and each
    of the K owns its share of the circle. So among any run of consecutive numbers, all come nearly as often as they are
    due. None is passed over for long, as it would be if each step rounded shares below one sample by itself, and a
    weight of 0 is never chosen.
    """
    share = weight.cumsum(0)
    return torch.searchsorted(share / share[-1], number.double() * GOLDEN % 1, right=True)


def shuffled(seed: int, stream: Stream, epoch: int, size: int, what: int = 0) -> Tensor:
    """Return the order of an epoch, int64 [size]; `what` tells apart several sets of one stream."""
    return torch.randperm(size, generator=_generator(seed, stream, -1 - what, epoch))


def _generator(seed: int, stream: Stream, step: int, index: int) -> torch.Generator:
    """Return a separate generator for each (seed, stream, step, index), mixing the words as splitmix64 does."""
    state = 0
    for word in (seed, _STREAMS[stream], step, index):
        state = (state + word + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state >> 1)
