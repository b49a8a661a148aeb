"""The shipped models behind the protocol: shapes, frozen weights, levels and times."""

import pytest
import torch
from torch import Tensor

from expunge.families import preflight
from expunge.families.base import DiffusionModel, rows
from expunge.families.family import Family
from expunge.settings import ModelSettings


@pytest.fixture(params=["flags", "faces"])
def model(request: pytest.FixtureRequest) -> DiffusionModel:
    return request.getfixturevalue(request.param)


def noise(model: DiffusionModel, count: int) -> Tensor:
    return torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("source", "size"), [("testbed:faces", (24, 24)), ("testbed:flags", (48, 48))])
def test_the_resolution_is_the_pipelines_own(source: str, size: tuple[int, int]) -> None:
    assert preflight("test", ModelSettings(source=source)) == size


@pytest.mark.parametrize(("name", "shape", "size"), [("flags", (8, 8, 12), (32, 48)), ("faces", (1, 24, 24), (24, 24))])
def test_shapes(name: str, shape: tuple[int, int, int], size: tuple[int, int], request: pytest.FixtureRequest) -> None:
    model: DiffusionModel = request.getfixturevalue(name)
    assert model.latent_shape == shape
    pictures = model.decode(noise(model, 2))
    assert pictures.shape == (2, 3, *size)
    assert pictures.abs().max() <= 1
    assert model.encode(pictures).shape == (2, *shape)
    conditioning = rows(model.condition(["", "a flag"]), torch.tensor([0, 1, 1]))
    time = model.time_at(torch.tensor([0.2, 0.5, 0.8]))
    prediction = model.predict(noise(model, 3), time, conditioning)
    assert prediction.shape == (3, *shape)
    assert prediction.dtype == torch.float32


@pytest.mark.parametrize("name", ["flags", "faces"])
def test_all_of_it_is_frozen_and_in_evaluation_mode(name: str, request: pytest.FixtureRequest) -> None:
    model: Family = request.getfixturevalue(name)
    assert not model.network.training
    assert not any(p.requires_grad for p in model.network.parameters())
    pictures = model.decode(noise(model, 1))
    outputs = [pictures, model.encode(pictures), *model.condition(["a flag"]).values()]
    assert not any(output.requires_grad for output in outputs), "nothing keeps a graph in memory"


def test_levels_and_times_round_trip(model: DiffusionModel) -> None:
    level = torch.linspace(0.05, 0.95, 19)
    at = model.at(model.time_at(level))
    torch.testing.assert_close(at.b / (at.a + at.b), level, rtol=0, atol=3e-3)


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
def test_uniform_times_stay_on_the_path(model: DiffusionModel, u: float) -> None:
    at = model.at(model.time_from_uniform(torch.tensor([u])))
    assert at.coefficients.isfinite().all()
    assert 0 < at.b.item() <= 1
