"""Which times, rows and noise a step sees: the right distributions, and the same whatever the number of workers."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from expunge.families.base import DiffusionModel
from expunge.settings import TrainingSettings
from expunge.unlearning.sampling import Draw, Stream, draw

BATCH, STEPS = 16, 64
SIZE = 7

Density = Literal["uniform", "logit_normal", "band"]


@pytest.fixture(params=["flags", "faces"])
def model(request: pytest.FixtureRequest) -> DiffusionModel:
    return request.getfixturevalue(request.param)


def one(
    model: DiffusionModel,
    step: int = 0,
    *,
    stream: Stream = "forget",
    batch: int = BATCH,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    density: Density = "uniform",
) -> Draw:
    training = TrainingSettings(seed=seed, density=density, band_level=0.45, band_width=0.8)
    return draw(model, training, stream, step, size=SIZE, batch=batch, rank=rank, world=world)


def levels(model: DiffusionModel, density: Density) -> Tensor:
    """Noise levels of STEPS steps, in time order."""
    at = model.at(torch.cat([one(model, step, density=density).time for step in range(STEPS)]))
    return at.b / (at.a + at.b)


def kolmogorov_smirnov(sample: Tensor, cdf: Tensor) -> float:
    """Largest distance of the empirical distribution to `cdf`, which is taken at the sorted sample."""
    count = len(sample)
    above, below = torch.arange(1, count + 1) / count, torch.arange(count) / count
    return max((above - cdf).abs().max().item(), (cdf - below).abs().max().item())


def test_uniform_density(model: DiffusionModel) -> None:
    time = torch.cat([one(model, step).time for step in range(STEPS)]).float().sort().values
    assert kolmogorov_smirnov(time, time / 1000) < 0.02
    assert time.mean().item() == pytest.approx(500, abs=10)
    assert time.std().item() == pytest.approx(1000 / 12**0.5, rel=0.02)


@pytest.mark.parametrize(("density", "centre", "width"), [("logit_normal", 0.5, 1.0), ("band", 0.45, 0.8)])
def test_normal_densities(model: DiffusionModel, density: Density, centre: float, width: float) -> None:
    logit = torch.logit(levels(model, density)).sort().values
    expected = torch.special.ndtr((logit - torch.logit(torch.tensor(centre))) / width)
    assert kolmogorov_smirnov(logit, expected) < 0.03
    assert logit.mean().item() == pytest.approx(torch.logit(torch.tensor(centre)).item(), abs=0.03)
    assert logit.std().item() == pytest.approx(width, rel=0.05)


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "band"])
def test_times_are_never_pinned(model: DiffusionModel, density: Density) -> None:
    """A public peer ships a leftover that trains at one timestep only."""
    times = torch.stack([one(model, step, density=density).time for step in range(STEPS)])
    assert len(times.unique()) > STEPS * BATCH / 4
    assert all(len(row.unique()) > BATCH / 2 for row in times), "within a step"
    assert all(len(column.unique()) > STEPS / 2 for column in times.T), "at a place in the batch"


def test_times_are_stratified_in_each_step(model: DiffusionModel) -> None:
    for step in range(4):
        slices = (one(model, step).time.float() / 1000 * BATCH).floor().clamp_max(BATCH - 1)
        # A discrete time may lie a rounding below its slice.
        assert len(slices.unique()) >= BATCH - 2


@pytest.mark.parametrize("batch", [1, 4, 5, SIZE, 16])
def test_rows_come_equally_often(faces: DiffusionModel, batch: int) -> None:
    rows = torch.cat([one(faces, step, batch=batch).rows for step in range(2 * SIZE)])
    assert torch.bincount(rows, minlength=SIZE).tolist() == [2 * batch] * SIZE


def test_every_epoch_has_its_own_order(faces: DiffusionModel) -> None:
    orders = {tuple(one(faces, epoch, batch=SIZE).rows.tolist()) for epoch in range(6)}
    assert len(orders) > 1
    assert all(sorted(order) == list(range(SIZE)) for order in orders)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("batch", [4, 5, 16])
@pytest.mark.parametrize("stream", ["forget", "retain"])
def test_independent_of_the_number_of_workers(model: DiffusionModel, stream: Stream, batch: int, world: int) -> None:
    alone = one(model, 3, stream=stream, batch=batch)
    for rank in range(world):
        part = one(model, 3, stream=stream, batch=batch, rank=rank, world=world)
        assert torch.equal(part.rows, alone.rows[rank::world])
        assert torch.equal(part.time, alone.time[rank::world])
        assert torch.equal(part.noise, alone.noise[rank::world])


def test_a_step_is_repeated_exactly(model: DiffusionModel) -> None:
    first = one(model, 5)
    torch.manual_seed(1234)  # the global generator has no say
    second = one(model, 5)
    assert torch.equal(first.rows, second.rows)
    assert torch.equal(first.time, second.time)
    assert torch.equal(first.noise, second.noise)


@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 6}, {"stream": "retain"}])
def test_seed_step_and_stream_draw_other_numbers(model: DiffusionModel, other: dict) -> None:
    first, second = one(model, 5), one(model, **{"step": 5, **other})
    assert not torch.equal(first.time, second.time)
    assert (first.noise == second.noise).float().mean().item() < 0.01


def test_noise_is_standard_normal_and_its_samples_differ(faces: DiffusionModel) -> None:
    noise = torch.cat([one(faces, step).noise for step in range(8)])
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    correlation = torch.corrcoef(noise.flatten(1))
    assert (correlation - torch.eye(len(noise))).abs().max().item() < 0.25
