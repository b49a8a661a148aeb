"""Base model and hotfix are one network, and each is itself whenever it is asked."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from expunge.families import components
from expunge.families.family import Family
from expunge.families.switch import Switch
from expunge.settings import TrainingSettings
from expunge.unlearning.adapter import attach, export
from tests.families.conftest import opened


@torch.no_grad()
def ask(model: Family) -> Tensor:
    x_t = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return model.predict(x_t, model.time_at(torch.tensor([0.3, 0.7])), model.condition(["a flag", ""]))


def hotfix(name: str, folder: Path) -> None:
    """One whose weights are moved at random."""
    model, training = opened(name), TrainingSettings(lora_rank=2)
    attach(model, training, None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.network.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    export(model, training, folder, "job", steps=1)


@pytest.mark.parametrize(("name", "kind"), [("flags", "lora"), ("faces", "full")])
@pytest.mark.parametrize("precision", ["float32", "half"])
def test_each_is_itself_whenever_it_is_asked(
    name: str, kind: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hotfix(name, tmp_path)
    if precision == "half":
        monkeypatch.setattr(components, "SMALL", 0)
    model = opened(name)
    base, network = ask(model), model.network
    switch = Switch(model, "lora" if kind == "lora" else "full", tmp_path)
    fixed = ask(model)
    assert (fixed - base).abs().max() > 1e-2
    for _ in range(2):
        switch.become("base")
        assert torch.equal(ask(model), base)
        switch.become("hotfix")
        assert torch.equal(ask(model), fixed)
    switch.become("base")
    switch.settle()
    assert (ask(model) - fixed).abs().max() < (0.1 if precision == "half" else 1e-6)
    assert model.network is network
    assert not any("lora" in name for name in model.network.state_dict()), "attacks find plain weights"
