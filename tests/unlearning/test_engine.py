"""The sharded engine on every ZeRO stage against plain torch in float64, on 1 and 2 gloo ranks.

The reference (`plain.py`) shares no code with the engine. Its trajectories are committed, so that a change of the
reference itself is noticed, too.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from expunge.settings import OFFLOAD_STAGES, TrainingSettings
from tests.device import DEVICE
from tests.unlearning import plain
from tests.unlearning.engine_cases import (
    ALONE,
    CASES,
    COMMITTED,
    ELASTIC,
    FAST,
    STAGES,
    STEPS,
    VARIANTS,
    Record,
    reference,
)
from tests.unlearning.groups import run_group, selected, starts_groups

# A GPU holds one rank: that of NCCL.
WORLDS = (1, 2) if DEVICE == "cpu" else (1,)

# The engine computes in float32, and its ranks sum in another order; AdamW divides by the gradient's own size and so
# magnifies that.
TOLERANCE = 1e-5
# As a share of the distance that the weights move, in norm: bf16 has 8 bits.
BF16_TOLERANCE = 0.05

Results = dict[str, Any]
Property = Callable[[str, object], None]

pytestmark = starts_groups


@dataclass(frozen=True)
class Runs:
    of: dict[int, list[Results]]
    """World size: for each rank, the results of each variant."""
    elastic: dict[int, list[Results]]
    """World size: for each rank, the final weights of each variant that the other world had begun."""
    shm: list[tuple[bool, bool]]
    """For each rank: whether DeepSpeed would compile its shared-memory operator, and whether it has one."""


def on_ranks(chosen: Callable[[str], bool] = lambda name: True) -> pytest.MarkDecorator:
    """Parametrise a test by the variants and the number of ranks that they run on."""
    return pytest.mark.parametrize(
        ("name", "world"),
        [
            pytest.param(name, world, marks=() if (name in FAST and world == 2) else pytest.mark.slow)
            for name in filter(chosen, VARIANTS)
            for world in WORLDS
            if world == 2 or name in ALONE
        ],
    )


def on_other_ranks(precision: str, *fast: str) -> pytest.MarkDecorator:
    chosen = sorted(name for name in ELASTIC if VARIANTS[name].precision == precision)
    return pytest.mark.parametrize(
        ("name", "world"),
        [
            pytest.param(name, world, marks=() if (name in fast and world == 1) else pytest.mark.slow)
            for name in chosen
            for world in WORLDS
            if len(WORLDS) == 2
        ],
    )


def float32(name: str) -> bool:
    return VARIANTS[name].precision == "fp32"


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Three process groups at most, with what the selected tests need and nothing else."""
    need, go_on = needed(request)
    folder = tmp_path_factory.mktemp("engine")
    found = {
        label: group(folder, label, world, names, others)
        for label, world, names, others in (
            ("two", 2, need[2], set()),
            ("one", 1, need[1], go_on[1]),
            ("two-again", 2, set(), go_on[2]),
        )
        if names or others
    }
    one, two, again = (found.get(label, []) for label in ("one", "two", "two-again"))
    return Runs(
        {1: [rank["run"] for rank in one], 2: [rank["run"] for rank in two]},
        {1: [rank["elastic"] for rank in one], 2: [rank["elastic"] for rank in again]},
        [rank["shm"] for ranks in found.values() for rank in ranks],
    )


def needed(request: pytest.FixtureRequest) -> tuple[dict[int, set[str]], dict[int, set[str]]]:
    """By world size, the variants to run, and those to go on with."""
    need: dict[int, set[str]] = {1: set(), 2: set()}
    go_on: dict[int, set[str]] = {1: set(), 2: set()}
    for test, name, world in selected(request):
        elastic = test.function in (test_another_number_of_ranks_goes_on, test_another_number_of_ranks_goes_on_in_bf16)
        if elastic:
            need[3 - world].add(name)
            go_on[world].add(name)
        if not elastic or not float32(name):
            need[world].add(name)
        if VARIANTS[name].offload:
            need[world].add(replace(VARIANTS[name], offload=False).name)
    return need, go_on


def group(folder: Path, label: str, world: int, names: set[str], others: set[str]) -> list[Results]:
    lists = (json.dumps(sorted(chosen)) for chosen in (names, others))
    run_group("engine_worker.py", str(folder), label, *lists, world=world, logs=folder, DS_ACCELERATOR=DEVICE)
    return [torch.load(folder / f"{label}-rank{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[list[Tensor], list[Record]]]:
    return {name: reference(name) for name in CASES}


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return plain.read(COMMITTED)


def start(name: str) -> list[Tensor]:
    return [p.detach() for p in CASES[name].network().parameters()]


def farthest(mine: Iterable[Tensor], theirs: Iterable[Tensor | list[float]]) -> float:
    """Return the largest difference between weights. Tests record it in the report that `--junitxml` writes."""
    pairs = zip(mine, map(torch.as_tensor, theirs), strict=True)
    return max((a.flatten().double() - b.flatten().double()).abs().max().item() for a, b in pairs)


def flat(record: Record) -> dict[str, float]:
    losses = {f"loss {k}": loss for k, loss in enumerate(record["losses"])}
    return {**losses, **{name: record[name] for name in ("cosine", "conflict", "norm")}}


@pytest.mark.parametrize("name", CASES)
def test_plain_torch_is_as_committed(
    name: str, expected: dict[str, tuple[list[Tensor], list[Record]]], committed: dict[str, Any]
) -> None:
    weights, records = expected[name]
    for mine, theirs in zip(weights, committed[name]["weights"], strict=True):
        torch.testing.assert_close(mine.flatten(), torch.tensor(theirs, dtype=torch.float64), rtol=0, atol=1e-7)
    for mine, theirs in zip(records, committed[name]["records"], strict=True):
        assert flat(mine) == pytest.approx(flat(theirs), rel=1e-6, abs=1e-7)


@on_ranks(float32)
def test_trajectory_is_the_committed_one(
    runs: Runs, name: str, world: int, committed: dict[str, Any], record_property: Property
) -> None:
    reference = committed[VARIANTS[name].case]
    for rank in runs.of[world]:
        away = farthest(rank[name]["weights"], reference["weights"])
        record_property("away", away)
        assert away < TOLERANCE
        for mine, theirs in zip(rank[name]["records"], reference["records"], strict=True):
            assert flat(mine) == pytest.approx(flat(theirs), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_trainable_weights_move_by_far_more_than_the_tolerance(
    name: str, expected: dict[str, tuple[list[Tensor], list[Record]]]
) -> None:
    moved = [(a - b).abs().max().item() for a, b in zip(expected[name][0], start(name), strict=True)]
    assert min(moved[:-2]) > 100 * TOLERANCE
    assert moved[-2:] == [0, 0], "the last layer is frozen"


@on_ranks(lambda name: not float32(name))
def test_bf16_goes_the_same_way(
    runs: Runs, name: str, world: int, expected: dict[str, tuple[list[Tensor], list[Record]]], record_property: Property
) -> None:
    weights, records = expected[VARIANTS[name].case]
    away, way = 0.0, 0.0
    for mine, theirs, before in zip(
        runs.of[world][0][name]["weights"], weights, start(VARIANTS[name].case), strict=True
    ):
        away += (mine - theirs).square().sum().item()
        way += (theirs - before).square().sum().item()
    record_property("away", (away / way) ** 0.5)
    assert (away / way) ** 0.5 < BF16_TOLERANCE
    for mine, theirs in zip(runs.of[world][0][name]["records"], records, strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=BF16_TOLERANCE)
        assert mine["conflict"] == theirs["conflict"]


@pytest.mark.parametrize(("name", "conflict"), [("conflict", 1.0), ("aligned", 0.0), ("three", 0.5), ("layer", 0.5)])
def test_the_cases_are_what_they_say(
    name: str, conflict: float, expected: dict[str, tuple[list[Tensor], list[Record]]]
) -> None:
    assert [record["conflict"] for record in expected[name][1]] == [conflict] * STEPS


@pytest.mark.parametrize(
    ("one", "other"),
    [("summed", "conflict"), ("unclipped", "conflict"), ("layer", "three"), ("tensor", "layer"), ("pcgrad", "three")],
)
def test_every_choice_changes_the_trajectory(
    one: str, other: str, expected: dict[str, tuple[list[Tensor], list[Record]]]
) -> None:
    """They differ by far more than the tolerance; otherwise the comparison would not notice them."""
    assert (
        max((a - b).abs().max().item() for a, b in zip(expected[one][0], expected[other][0], strict=True))
        > 100 * TOLERANCE
    )


@on_ranks()
def test_ranks_agree_exactly(runs: Runs, name: str, world: int) -> None:
    first, *others = (rank[name] for rank in runs.of[world])
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first["weights"], other["weights"], strict=True))
        for one, another in zip(first["records"], other["records"], strict=True):
            assert {**one, "stashed": None} == {**another, "stashed": None}


@on_ranks()
def test_resuming_repeats_the_trajectory_bitwise(runs: Runs, name: str, world: int) -> None:
    for rank in runs.of[world]:
        result = rank[name]
        assert result["done"] == STEPS // 2
        assert result["resumed_records"] == result["records"][STEPS // 2 :]
        assert all(torch.equal(a, b) for a, b in zip(result["weights"], result["resumed"], strict=True))


@on_ranks()
def test_a_step_that_is_not_finite_is_skipped_and_leaves_no_trace(runs: Runs, name: str, world: int) -> None:
    """Each objective in turn, on the last rank only. The steps after it are bitwise those of an undisturbed run."""
    count = len(CASES[VARIANTS[name].case].signs)
    for rank in runs.of[world]:
        assert rank[name]["bad"] == [(k,) for k in range(count)]
        assert rank[name]["resumed_records"] == rank[name]["records"][STEPS // 2 :]


@on_other_ranks("fp32", "conflict-stage1-fp32-1x", "conflict-stage3-fp32-1x")
def test_another_number_of_ranks_goes_on(
    runs: Runs, name: str, world: int, committed: dict[str, Any], record_property: Property
) -> None:
    for rank in runs.elastic[world]:
        away = farthest(rank[name], committed[VARIANTS[name].case]["weights"])
        record_property("away", away)
        assert away < TOLERANCE


@on_other_ranks("bf16")
def test_another_number_of_ranks_goes_on_in_bf16(runs: Runs, name: str, world: int, record_property: Property) -> None:
    for rank in runs.elastic[world]:
        away = farthest(rank[name], runs.of[world][0][name]["weights"])
        record_property("away", away)
        assert away < 5e-3


@on_ranks()
def test_extra_memory_is_one_shard_per_forget_objective(runs: Runs, name: str, world: int) -> None:
    """All ranks together stash the trainable numbers once (stage 0: once per rank) and DeepSpeed's padding.

    On stage 1 each rank's part is padded to a multiple of 2, on stage 3 each tensor to a multiple of the ranks.
    """
    variant, case = VARIANTS[name], CASES[VARIANTS[name].case]
    trained = [p.numel() for p in case.network().parameters() if p.requires_grad]
    whole = sum(trained)
    if variant.stage == 1:
        part = -(-whole // (2 * world)) * 2
        whole = -(-whole // part) * part
    if variant.stage == 3:
        whole = sum(-(-n // world) * world for n in trained)
    size = 4 if variant.precision == "fp32" else 2
    copies = world if variant.stage == 0 else 1
    for step in range(STEPS):
        stashed = sum(rank[name]["records"][step]["stashed"] for rank in runs.of[world])
        assert stashed == (len(case.signs) - 1) * whole * size * copies


@on_ranks()
def test_consolidated_weights_are_the_trained_ones_in_float32(runs: Runs, name: str, world: int) -> None:
    result, bf16 = runs.of[world][0][name], VARIANTS[name].precision == "bf16"
    for whole, trained in zip(result["whole"], result["weights"], strict=False):
        assert whole.dtype == torch.float32
        assert torch.equal(whole.bfloat16().float() if bf16 else whole, trained)
    assert len(result["whole"]) == len(result["weights"]) - 2


@on_ranks(float32)
def test_distance_from_the_start(runs: Runs, name: str, world: int) -> None:
    before, after = start(VARIANTS[name].case)[:-2], runs.of[world][0][name]["weights"][:-2]
    moved = sum((b - a).square().sum().item() for a, b in zip(before, after, strict=True))
    expected = (moved / sum(a.square().sum().item() for a in before)) ** 0.5
    assert [rank[name]["moved"] for rank in runs.of[world]] == [pytest.approx(expected, rel=1e-5)] * world


@on_ranks(lambda name: VARIANTS[name].offload)
def test_an_offloaded_optimizer_steps_exactly_as_another(runs: Runs, name: str, world: int) -> None:
    for rank in runs.of[world]:
        here, there = rank[name], rank[replace(VARIANTS[name], offload=False).name]
        assert (here["offload"], there["offload"]) == (True, False)
        assert here["records"] == there["records"]
        assert all(torch.equal(a, b) for a, b in zip(here["weights"], there["weights"], strict=True))


@on_ranks(lambda name: name == "conflict-stage0-fp32-1x")
def test_shared_memory_op_stays_disabled(runs: Runs, name: str, world: int) -> None:
    """It would be compiled for minutes at the first initialisation; the switch is an internal of DeepSpeed."""
    assert set(runs.shm) == {(False, False)}


def test_every_stage_runs_in_both_tiers() -> None:
    assert {VARIANTS[name].stage for name in FAST} == {VARIANTS[name].stage for name in VARIANTS} == set(STAGES)


@pytest.mark.parametrize("stage", sorted({*STAGES} - {*OFFLOAD_STAGES}))
def test_offload_is_refused_on_the_other_stages(stage: int) -> None:
    with pytest.raises(ValidationError, match=f"zero_stage: stage {stage} cannot have offload_optimizer"):
        TrainingSettings.model_validate({"offload_optimizer": True, "zero_stage": stage})
