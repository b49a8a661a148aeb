"""The memory plan against what is there: published sizes, real tensors, and DeepSpeed's own estimators."""

import json
import math
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from expunge.errors import InputError
from expunge.families import load_model
from expunge.families.architectures import architecture
from expunge.settings import Settings, TrainingSettings
from expunge.unlearning.adapter import attach
from expunge.unlearning.memory import (
    RESERVE,
    Footprint,
    activation_bytes,
    add_lora,
    choose,
    estimate,
    estimates,
    footprint,
    tasks_that_fit,
)

MODELS = Settings.model_validate({}).models
TRAINING = TrainingSettings.model_validate({"precision": "bf16"})
RESOLUTION = {"faces": (24, 24), "flags": (32, 48)}


@pytest.mark.parametrize(("name", "parameters"), [("sd3-medium", 2_028_328_000), ("sd3.5-large", 8_056_627_520)])
def test_published_models_have_their_published_size(name: str, parameters: int) -> None:
    counted = footprint(name, {}, TRAINING.model_copy(update={"adapter": "full"}), 1)
    assert counted.parameters == counted.trained == parameters
    assert counted.weight_bytes == 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["faces", "flags"])
def test_fake_tensors_keep_what_real_ones_keep(name: str, checkpointing: bool) -> None:
    counts = []
    for mode in (FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu")):
        with mode:
            model = architecture(name, MODELS)
            if model.lora_targets:
                model.network.requires_grad_(False)
                add_lora(model, 4)
            counts.append(activation_bytes(model, 3, torch.float32, checkpointing=checkpointing))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", ["faces", "flags"])
def test_a_real_step_holds_the_bytes_of_the_plan(name: str) -> None:
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
    planned = estimate(footprint(name, MODELS, training, 1), 0, "batch", gpus=1, requests=1)
    copies = 1 if model.lora_targets else 2
    assert planned.weights == copies * sum(p.nbytes for p in model.network.parameters())
    assert planned.gradient == sum(p.nbytes for p in trained)
    assert planned.optimizer == sum(m.nbytes for m in moments)


def test_checkpointing_keeps_less() -> None:
    kept = [
        footprint("sd3-medium", {}, TRAINING.model_copy(update={"activation_checkpointing": on}), 1).activations
        for on in (False, True)
    ]
    assert kept[1] < kept[0] / 5


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
    """By `GPUs-offload`: bytes of host memory a node and bytes a GPU, of stages 2 and 3."""
    command = [sys.executable, "-c", ESTIMATORS, str(FULL.parameters), str(FULL.largest)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("gpus", [1, 8])
def test_model_states_are_what_deepspeed_estimates(gpus: int, theirs: dict[str, list[tuple[int, int]]]) -> None:
    """DeepSpeed counts whole gradients at stage 2, and 2 bytes a parameter of buffers."""
    for stage, (_, expected) in zip((2, 3), theirs[f"{gpus}-False"], strict=True):
        ours = estimate(FULL, stage, "batch", gpus=gpus, requests=1)
        assert 0.6 < (ours.total - ours.stash) / expected <= 1.0, (stage, ours, expected)


@pytest.mark.parametrize("gpus", [1, 8])
def test_an_offloaded_optimizer_is_where_deepspeed_estimates(
    gpus: int, theirs: dict[str, list[tuple[int, int]]]
) -> None:
    """DeepSpeed counts no gradient on the GPU, and on the host not the 2 bytes a parameter of a buffer."""
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


def test_the_stash_is_one_shard_a_forget_gradient() -> None:
    f = Footprint(1000, 800, False, 2, 10, 0)
    by_stage = {o.stage: o.stash for o in estimates(f, gpus=4, requests=5) if o.tasks == "request"}
    assert by_stage == {0: 5 * 800 * 2, 1: 5 * 200 * 2, 2: 5 * 200 * 2, 3: 5 * 200 * 2}
    assert estimate(f, 1, "batch", gpus=4, requests=5).stash == 200 * 2


def test_gradients_per_request_where_any_stage_holds_them_else_one_for_all_else_nothing() -> None:
    f = Footprint(10**9, 10**9, False, 2, 10**7, 0)
    options = estimates(f, gpus=8, requests=32)
    roomy, tight, tiny = (choose(options, n * 10**9) for n in (100, 8, 1))
    assert roomy is not None
    assert (roomy.stage, roomy.tasks) == (1, "request")
    assert tight is not None
    assert (tight.stage, tight.tasks) == (1, "batch")
    assert tiny is None


@pytest.mark.parametrize(("requests", "tasks"), [(1, "request"), (10, "request"), (11, "batch"), (500, "batch")])
def test_auto_keeps_gradients_apart_up_to_the_last_stash_that_fits(requests: int, tasks: str) -> None:
    """Stage 1 on two GPUs: weights 2, gradient 2 and 1, a stash of 1 a request, an optimizer of 6 MB: 21 with ten."""
    f = Footprint(10**6, 10**6, False, 2, 10**4, 0)
    room = math.ceil(21e6 / (1 - RESERVE))
    training = TRAINING.model_copy(update={"forget_batch": 1000})
    assert tasks_that_fit(f, training, gpus=2, requests=requests, gpu_bytes=room) == tasks


@pytest.mark.parametrize(("requests", "tasks"), [(4, "request"), (5, "batch")])
def test_auto_adds_no_sample_to_a_step(requests: int, tasks: str) -> None:
    """Eight forget samples on two workers: four each, for as many gradients."""
    assert (TRAINING.forget_batch, TRAINING.workers) == (8, 2)
    f = Footprint(10**6, 10**6, False, 2, 10**4, 0)
    assert tasks_that_fit(f, TRAINING, gpus=2, requests=requests, gpu_bytes=10**12) == tasks


def test_an_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'sd4' is not known: use one of faces, flags, sd3-medium, sd3\.5-large"):
        footprint("sd4", MODELS, TRAINING, 1)
