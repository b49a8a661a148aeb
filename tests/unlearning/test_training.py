"""Real steps of the shipped models: ranks, ZeRO stage, micro-batches and recomputation change nothing but rounding.

The small SD3 trains LoRA with a gradient per request, against the frozen model; the small UNet trains all weights.
"""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from expunge.unlearning.adapter import LORA_FILE
from tests.unlearning import plain
from tests.unlearning.groups import run_group, selected, starts_groups
from tests.unlearning.training_cases import ALONE, COMMITTED, FAST, JOBS, REQUESTS, STEPS, VARIANTS, load, reference

WORLDS = (1, 2)

# As a share of the distance that the weights move, in norm. Seen: 6e-5 in float32, where AdamW magnifies the rounding
# of small gradients; and 0.5 in bf16, where at first it turns nothing but rounding into full steps.
TOLERANCE = 2e-4
BF16_TOLERANCE = 0.7

Runs = dict[int, list[dict[str, Any]]]
Property = Callable[[str, object], None]

pytestmark = starts_groups
each_job = pytest.mark.parametrize("job", [pytest.param("flags"), pytest.param("faces", marks=pytest.mark.slow)])


def on_ranks(*precisions: str) -> pytest.MarkDecorator:
    """Parametrise a test by the variants of these precisions and the number of ranks that they run on."""
    pairs = [(name, world) for world in WORLDS for name in VARIANTS if world == 2 or name in ALONE]
    return pytest.mark.parametrize(
        ("name", "world"),
        [
            pytest.param(name, world, marks=() if (name in FAST and world == 2) else pytest.mark.slow)
            for name, world in pairs
            if VARIANTS[name].precision in precisions
        ],
    )


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("training")
    found: Runs = {}
    for world in WORLDS:
        names = sorted({name for _, name, ranks in selected(request) if ranks == world})
        if names:
            run_group("training_worker.py", str(folder), json.dumps(names), world=world, logs=folder)
            files = [folder / f"world{world}-rank{rank}.pt" for rank in range(world)]
            found[world] = [torch.load(file, weights_only=False) for file in files]
    return found


def away(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert mine.keys() == theirs.keys()
    apart = sum((mine[name] - theirs[name]).square().sum().item() for name in theirs)
    return (apart / sum(way.square().sum().item() for way in theirs.values())) ** 0.5


@each_job
def test_plain_torch_is_as_committed(job: str) -> None:
    moved, records = reference(job)
    committed: Any = plain.read(COMMITTED)[job]
    for mine, theirs in zip(records, committed["records"], strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-3, abs=1e-7)
        assert mine["norm"] == pytest.approx(theirs["norm"], rel=1e-3)
    assert {name: way.norm().item() for name, way in moved.items()} == pytest.approx(
        committed["moved"], rel=1e-2, abs=1e-5
    )


@on_ranks("fp32")
def test_float32_goes_the_same_way(runs: Runs, name: str, world: int, record_property: Property) -> None:
    moved, records = reference(VARIANTS[name].job)
    distance = away(runs[world][0][name]["moved"], moved)
    record_property("away", distance)
    assert distance < TOLERANCE
    for mine, theirs in zip(runs[world][0][name]["records"], records, strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-3, abs=1e-7)
        assert mine["conflict"] == theirs["conflict"]
        for figure in ("cosine", "norm"):
            assert mine[figure] == pytest.approx(theirs[figure], rel=1e-3, abs=1e-4)


@on_ranks("bf16")
def test_bf16_goes_much_the_same_way(runs: Runs, name: str, world: int, record_property: Property) -> None:
    moved, records = reference(VARIANTS[name].job)
    distance = away(runs[world][0][name]["moved"], moved)
    record_property("away", distance)
    assert distance < BF16_TOLERANCE
    for mine, theirs in zip(runs[world][0][name]["records"], records, strict=True):
        assert mine["losses"][:-1] == pytest.approx(theirs["losses"][:-1], rel=0.05)


@each_job
def test_each_request_has_a_gradient_if_the_job_says_so(job: str) -> None:
    count = REQUESTS if JOBS[job]["objectives"] == "request" else 1
    assert [len(record["losses"]) for record in reference(job)[1]] == [count + 1] * STEPS


@on_ranks("fp32", "bf16")
def test_every_stage_exports_what_it_has_trained(runs: Runs, name: str, world: int) -> None:
    """The format is diffusers'."""
    result, job = runs[world][0][name], VARIANTS[name].job
    hotfix, trained = result["hotfix"], result["moved"]
    if hotfix.kind == "full":
        base, fixed = load(job), load(job)
        fixed.apply_hotfix(fixed.network, hotfix.kind, hotfix.path)
        before, after = (dict(model.network.named_parameters()) for model in (base, fixed))
        got = {key: after[key].detach() - before[key].detach() for key in trained}
        torch.testing.assert_close(got, trained, rtol=0, atol=1e-6)
    else:
        adapter = {key: value for key, value in load_file(hotfix.path / LORA_FILE).items() if "lora_B" in key}
        # B starts at 0, so its value is the distance that it moved.
        theirs = {key: way for key, way in trained.items() if "lora_B" in key}
        assert len(adapter) == len(theirs) > 0
        for (_, mine), (_, way) in zip(sorted(adapter.items()), sorted(theirs.items()), strict=True):
            torch.testing.assert_close(mine, way, rtol=0, atol=1e-6)
