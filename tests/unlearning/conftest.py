"""The shipped models, for reading, loaded once a module; and a toy model for everything that needs no real one."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from expunge.families import load_model, preflight
from expunge.families.base import Conditioning, DiffusionModel
from expunge.families.family import Family
from expunge.families.path import MIN_B, PathPoint, Prediction, point
from expunge.settings import Settings

Load = Callable[[str], Family]


class Toy(DiffusionModel):
    """Latents [2, 4, 4]; time is the noise level; the last of the network's two layers is trainable."""

    component = "network"

    def __init__(self, family: Prediction = "flow") -> None:
        torch.manual_seed(0)
        self.family: Prediction = family
        self.latent_shape = (2, 4, 4)
        self.network = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1).requires_grad_(False), nn.Tanh(), nn.Conv2d(3, 2, 3, padding=1)
        )

    def encode(self, pictures: Tensor) -> Tensor:
        return pictures

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def condition(self, prompts: Sequence[str]) -> Conditioning:
        return {"length": torch.tensor([float(len(prompt)) for prompt in prompts])}

    def at(self, time: Tensor) -> PathPoint:
        if self.family == "flow":
            return point("flow", 1 - time, time)
        angle = torch.atan(time / (1 - time))
        return point(self.family, angle.cos(), angle.sin())

    def time_at(self, level: Tensor) -> Tensor:
        return level

    def time_from_uniform(self, u: Tensor) -> Tensor:
        return u.clamp_min(MIN_B)

    def predict(self, x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return self.network(x_t) + 0.01 * conditioning["length"].view(-1, 1, 1, 1)

    def times_down(self, first: Tensor, steps: int) -> list[Tensor]:
        raise NotImplementedError


@pytest.fixture(params=["flow", "epsilon", "v_prediction"])
def toy(request: pytest.FixtureRequest) -> Toy:
    return Toy(request.param)


def _load(name: str) -> Family:
    options = Settings.model_fields["models"].get_default(call_default_factory=True)[name]
    return load_model(options, preflight("test", options))


@pytest.fixture
def fresh() -> Load:
    """A shipped model of the test's own."""
    return _load


@pytest.fixture(scope="module")
def flags() -> DiffusionModel:
    return _load("flags")


@pytest.fixture(scope="module")
def faces() -> DiffusionModel:
    return _load("faces")
