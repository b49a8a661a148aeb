"""A sample is a function of its own item, whatever shares its pass; and a pass that does not fit is made smaller."""

import pytest
import torch
from torch import Tensor

from expunge.families import load_model
from expunge.families.family import Family
from expunge.generation.noise import seeded_noise
from expunge.generation.sampling import Items, Sampler
from expunge.settings import load_settings

SIZES = {"flags": (32, 48), "faces": (24, 24)}
SEEDS = torch.tensor([7, 1 << 40, 3, 3, 1 << 60])


@pytest.fixture(params=["flags", "faces"])
def model(request: pytest.FixtureRequest) -> Family:
    return load_model(load_settings().model(request.param), SIZES[request.param])


def sampler(model: Family, most: int) -> Sampler:
    cond = model.condition(["a flag", "the flag of Peru"])
    return Sampler(model, cond, model.condition([""]), guidance=2.0, most=most)


def items(model: Family, level: float = 1.0, start: Tensor | None = None) -> Items:
    noise = lambda index: seeded_noise(SEEDS[index], model.latent_shape)  # noqa: E731
    return Items(torch.tensor([0, 1, 1, 1, 0]), noise, steps=3, level=level, start=start)


def test_the_batch_changes_rounding_and_nothing_else(model: Family) -> None:
    start = seeded_noise(SEEDS + 1, model.latent_shape)
    for asked in (items(model), items(model, 0.5, start)):
        together = sampler(model, 64)(asked)
        assert torch.equal(together[2], together[3]), "the same item"
        for most in (1, 2):
            torch.testing.assert_close(sampler(model, most)(asked), together, rtol=0, atol=1e-4)


def test_a_pass_that_does_not_fit_is_halved_and_repeated(model: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sampler(model, 64)(items(model))
    predict, room = type(model).predict, 2

    def small(self: Family, x_t: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        if len(x_t) > room:
            raise torch.OutOfMemoryError("this sample needs more")
        return predict(self, x_t, time, conditioning)

    monkeypatch.setattr(type(model), "predict", small)
    made = sampler(model, 4)
    torch.testing.assert_close(made(items(model)), expected, rtol=0, atol=1e-4)
    assert made.batch in (1, 2), "with guidance, every item is asked twice"
    room = 0
    with pytest.raises(torch.OutOfMemoryError, match="needs more"):
        made(items(model))
