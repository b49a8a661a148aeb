"""Activations counted on fake tensors against those of real ones."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from expunge.families.architectures import architecture
from expunge.settings import Settings
from expunge.unlearning.memory.activations import activation_bytes
from expunge.unlearning.memory.footprint import add_lora

MODELS = Settings.model_validate({}).models


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["faces", "flags"])
def test_fake_tensors_keep_what_real_ones_keep(name: str, checkpointing: bool) -> None:
    counts = []
    for mode in (FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu")):
        with mode:
            model = architecture(name, MODELS)
            if targets := model.family.lora_targets:
                model.network.requires_grad_(False)
                add_lora(model.network, targets, 4)
            counts.append(activation_bytes(model, 3, torch.float32, checkpointing=checkpointing))
    assert counts[0] == counts[1] > 0
