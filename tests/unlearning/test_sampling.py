"""The times, rows and noise of a step: the right distributions, the same whatever the number of workers."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from expunge.families.base import DiffusionModel
from expunge.settings import TrainingSettings
from expunge.unlearning.sampling import Draw, Stream, draw_probe, draw_samples, pick, pick_by_weight

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
    rows = pick(seed, stream, step, SIZE, batch)
    return draw_samples(model, training, stream, step, rows, torch.arange(rank, batch, world))


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
    assert all(len(column.unique()) > STEPS / 2 for column in times.T), "at an index of the batch"


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


@pytest.mark.parametrize("start", [0, 8, 12345, 10**7])
@pytest.mark.parametrize("weight", [[1.0], [0.0, 1.0, 0.0], [0.1, 0.9, 0.5], [1e-3, 1.0], [1.0] * 100])
def test_picks_by_weight_come_as_often_as_they_are_due(weight: list[float], start: int) -> None:
    due = torch.tensor(weight, dtype=torch.float64)
    for count in (8, 80, 800):
        picked = pick_by_weight(due, torch.arange(start, start + count))
        seen = torch.bincount(picked, minlength=len(weight))
        assert int(seen.sum()) == count
        assert (seen - count * due / due.sum()).abs().max().item() < 3
    assert seen[due == 0].sum().item() == 0


def test_nobody_waits_long_for_a_share_below_one_sample() -> None:
    """With 100 requests and 8 samples per step, each comes within twice the steps in which it is due."""
    picked = pick_by_weight(torch.ones(100, dtype=torch.float64), torch.arange(8 * 100))
    for first in range(0, 600, 8):
        assert len(picked[first : first + 200].unique()) == 100


def test_a_probe_has_one_noise_per_row(model: DiffusionModel) -> None:
    rows, level = torch.tensor([2, 0, 2]), torch.tensor([0.4, 0.6, 0.6])
    whole = draw_probe(model, TrainingSettings(), rows, level)
    assert torch.equal(whole.noise[0], whole.noise[2])
    assert not torch.equal(whole.noise[0], whole.noise[1])
    at = model.at(whole.time)
    assert (at.b / (at.a + at.b)).tolist() == pytest.approx([0.4, 0.6, 0.6], abs=1e-2)
    torch.manual_seed(1234)  # the global generator has no say
    part = draw_probe(model, TrainingSettings(), rows[1:], level[1:])
    assert torch.equal(part.noise, whole.noise[1:])
    assert torch.equal(part.time, whole.time[1:])
