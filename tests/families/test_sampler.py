"""The deterministic sampler: guidance moves no more than it should, and sampling starts and ends where it should."""

import pytest
import torch
from torch import Tensor

from expunge.families.base import DiffusionModel, rows
from expunge.families.sampler import generate
from expunge.families.sd3 import SD3


def noise(model: DiffusionModel, count: int) -> Tensor:
    return torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(0))


def test_guidance_leaves_samples_without_a_prompt_alone(flags: SD3, monkeypatch: pytest.MonkeyPatch) -> None:
    start, empty = noise(flags, 3), rows(flags.condition([""]), torch.zeros(3, dtype=torch.long))
    mixed = flags.condition(["", "the flag of Japan", ""])
    guided = generate(flags, start, mixed, steps=3, guidance=2.0, empty=empty)
    plain = generate(flags, start, mixed, steps=3, guidance=1.0, empty=empty)
    torch.testing.assert_close(guided[::2], plain[::2], rtol=0, atol=1e-4)
    assert (guided[1] - plain[1]).abs().max() > 0.1

    asked: list[int] = []
    predict = flags.predict
    monkeypatch.setattr(flags, "predict", lambda x, *more: asked.append(len(x)) or predict(x, *more))
    generate(flags, start, mixed, steps=3, guidance=2.0, empty=empty)
    assert asked == [4, 4, 4], "one of the three is asked about twice"


@pytest.mark.parametrize("level", [0.4, 0.6])
@pytest.mark.parametrize("name", ["flags", "faces"])
def test_sampling_starts_at_the_level_and_ends_above_clean(
    name: str, level: float, request: pytest.FixtureRequest
) -> None:
    model: DiffusionModel = request.getfixturevalue(name)
    path = model.path_down(torch.tensor([level]), 12)
    times = torch.cat([time for time, _ in path])
    at = model.at(times)
    levels = at.b / (at.a + at.b)
    assert levels[0].item() == pytest.approx(level, abs=3e-3)
    assert (levels.diff() < 0).all()
    assert times[-1] > 0
    assert len(times) == 12
    assert [there is None for _, there in path] == [False] * 11 + [True], "the last step goes to the clean estimate"
