"""Estimates against what a real step holds, and against DeepSpeed's own estimators."""

import json
import subprocess
import sys

import pytest
import torch

from expunge.families import load_model
from expunge.settings import Settings, TrainingSettings
from expunge.unlearning.adapter import attach
from expunge.unlearning.memory import Footprint, estimate, estimates, footprint

MODELS = Settings.model_validate({}).models
RESOLUTION = {"faces": (24, 24), "flags": (32, 48)}


@pytest.mark.parametrize("name", ["faces", "flags"])
def test_a_real_step_holds_the_estimated_bytes(name: str) -> None:
    """fp32, one worker: weights, gradient and AdamW's state after a real step of the real network with its adapter."""
    training = TrainingSettings.model_validate({"lora_rank": 8})
    model = load_model(MODELS[name], RESOLUTION[name])
    attach(model, training, None)
    trained = [p for p in model.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [s for state in optimizer.state.values() for s in state.values() if s.numel() > 1 or s.ndim]
    estimated = estimate(footprint(name, MODELS, training, 1), 0, "batch", gpus=1, requests=1)
    copies = 1 if model.lora_targets else 2
    assert estimated.weights == copies * sum(p.nbytes for p in model.network.parameters())
    assert estimated.gradient == sum(p.nbytes for p in trained)
    assert estimated.optimizer == sum(m.nbytes for m in moments)


ESTIMATORS = """
import json, sys
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as two
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as three
parameters, largest = map(int, sys.argv[1:])
found = {}
for gpus in (1, 8):
    for off in (False, True):
        second = two(parameters, num_gpus_per_node=gpus, cpu_offload=off, additional_buffer_factor=1)
        third = three(parameters, largest, gpus, cpu_offload=off, cpu_offload_params=False, additional_buffer_factor=1)
        found[f"{gpus}-{off}"] = [second[:2], third[:2]]
print(json.dumps(found))
"""
FULL = Footprint(2_000_000_000, 2_000_000_000, False, 2, 80_000_000, 0)
"""Full fine-tuning in bf16."""


@pytest.fixture(scope="module")
def theirs() -> dict[str, list[tuple[int, int]]]:
    """By `GPUs-offload`: bytes of host memory per node and bytes per GPU, of stages 2 and 3."""
    command = [sys.executable, "-c", ESTIMATORS, str(FULL.parameters), str(FULL.largest)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow  # importing DeepSpeed
@pytest.mark.parametrize("gpus", [1, 8])
def test_model_states_are_what_deepspeed_estimates(gpus: int, theirs: dict[str, list[tuple[int, int]]]) -> None:
    """DeepSpeed counts whole gradients at stage 2, and 2 bytes per parameter of buffers."""
    for stage, (_, expected) in zip((2, 3), theirs[f"{gpus}-False"], strict=True):
        ours = estimate(FULL, stage, "batch", gpus=gpus, requests=1)
        assert 0.6 < (ours.total - ours.stash) / expected <= 1.0, (stage, ours, expected)


@pytest.mark.slow  # importing DeepSpeed
@pytest.mark.parametrize("gpus", [1, 8])
def test_an_offloaded_optimizer_is_where_deepspeed_estimates(
    gpus: int, theirs: dict[str, list[tuple[int, int]]]
) -> None:
    """DeepSpeed counts no gradient on the GPU, and on the host not the 2 bytes per parameter of a buffer."""
    (_, second), (host, third) = theirs[f"{gpus}-True"]
    one, three = (estimate(FULL, stage, "batch", gpus=gpus, requests=1, offload=True) for stage in (1, 3))
    assert one.optimizer == three.optimizer == 0
    assert one.total - one.stash - one.gradient == second
    assert 0.6 < three.total / third <= 1.0
    stash = estimate(FULL, 3, "batch", gpus=gpus, requests=1).stash
    assert [gpus * held for held in (one.host, three.host - stash)] == [host + 2 * FULL.trained] * 2


def test_only_an_offloaded_optimizer_is_on_the_host() -> None:
    assert {o.stage: o.host for o in estimates(FULL, gpus=2, requests=1)} == dict.fromkeys((0, 1, 2, 3), 0)
    assert {o.stage for o in estimates(FULL, gpus=2, requests=1, offload=True) if o.host} == {1, 3}


def test_the_stash_is_one_shard_per_forget_gradient() -> None:
    f = Footprint(1000, 800, False, 2, 10, 0)
    by_stage = {o.stage: o.stash for o in estimates(f, gpus=4, requests=5) if o.objectives == "request"}
    assert by_stage == {0: 5 * 800 * 2, 1: 5 * 200 * 2, 2: 5 * 200 * 2, 3: 5 * 200 * 2}
    assert estimate(f, 1, "batch", gpus=4, requests=5).stash == 200 * 2
