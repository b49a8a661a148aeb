"""The sharded engine on every ZeRO stage against plain torch, on 1 and 2 gloo ranks.

The trajectories are committed, so that a change of the reference itself is seen, too.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from expunge.settings import OFFLOAD_STAGES, TrainingSettings
from tests.unlearning.engine_cases import CASES, COMMITTED, ELASTIC, STAGES, STEPS, VARIANTS, Record, reference
from tests.unlearning.groups import run_group, starts_groups

WORLDS = (1, 2)

# float32, and the ranks sum in another order; AdamW divides by the gradient's own size and so magnifies that.
TOLERANCE = 1e-5
# Of the way that the weights go, in norm: bf16 has 8 bits.
BF16_TOLERANCE = 0.05

FP32 = [name for name, variant in VARIANTS.items() if variant.precision == "fp32"]
BF16 = [name for name, variant in VARIANTS.items() if variant.precision == "bf16"]
OFFLOAD = [name for name, variant in VARIANTS.items() if variant.offload]

Runs = dict[int, list[dict[str, Any]]]
Property = Callable[[str, object], None]

pytestmark = starts_groups


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """World size: what every rank wrote."""
    folder = tmp_path_factory.mktemp("engine")
    for world in WORLDS:
        run_group("engine_worker.py", str(folder), "run", world=world, logs=folder)
    return _results(folder, "run")


@pytest.fixture(scope="session")
def elastic(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """World size: the final weights by variant, each rank's, after going on from what the other world had saved."""
    [folder] = tmp_path_factory.getbasetemp().glob("engine0")
    for world in WORLDS:
        run_group("engine_worker.py", str(folder), "elastic", world=world, logs=folder)
    return _results(folder, "elastic")


def _results(folder: Path, what: str) -> Runs:
    def one(world: int, rank: int) -> dict[str, Any]:
        return torch.load(folder / f"{what}-world{world}-rank{rank}.pt", weights_only=False)

    return {world: [one(world, rank) for rank in range(world)] for world in WORLDS}


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[list[Tensor], list[Record]]]:
    return {name: reference(name) for name in CASES}


def start(name: str) -> list[Tensor]:
    return [p.detach() for p in CASES[name].network().parameters()]


def farthest(mine: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """The largest difference of two weights. What was observed goes into the report that `--junitxml` writes."""
    return max((a - b).abs().max().item() for a, b in zip(mine, theirs, strict=True))


def flat(record: Record) -> dict[str, float]:
    losses = {f"loss {k}": loss for k, loss in enumerate(record["losses"])}
    return {**losses, **{name: record[name] for name in ("cosine", "conflict", "norm")}}


@pytest.mark.parametrize("name", CASES)
def test_plain_torch_is_as_committed(name: str, expected: dict[str, tuple[list[Tensor], list[Record]]]) -> None:
    weights, records = expected[name]
    committed = json.loads(COMMITTED.read_text())[name]
    for mine, theirs in zip(weights, committed["weights"], strict=True):
        torch.testing.assert_close(mine.flatten(), torch.tensor(theirs), rtol=0, atol=TOLERANCE)
    for mine, theirs in zip(records, committed["records"], strict=True):
        assert flat(mine) == pytest.approx(flat(theirs), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", FP32)
def test_trajectory_is_the_committed_one(runs: Runs, name: str, world: int, record_property: Property) -> None:
    committed = json.loads(COMMITTED.read_text())[VARIANTS[name].case]
    for rank in runs[world]:
        away = farthest(
            [weights.flatten() for weights in rank[name]["weights"]], map(torch.tensor, committed["weights"])
        )
        record_property("away", away)
        assert away < TOLERANCE
        for mine, theirs in zip(rank[name]["records"], committed["records"], strict=True):
            assert flat(mine) == pytest.approx(flat(theirs), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_the_trainable_weights_move_by_far_more_than_the_tolerance(
    name: str, expected: dict[str, tuple[list[Tensor], list[Record]]]
) -> None:
    moved = [(a - b).abs().max().item() for a, b in zip(expected[name][0], start(name), strict=True)]
    assert min(moved[:-2]) > 100 * TOLERANCE
    assert moved[-2:] == [0, 0], "the last layer is frozen"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", BF16)
def test_bf16_goes_the_same_way(
    runs: Runs, name: str, world: int, expected: dict[str, tuple[list[Tensor], list[Record]]], record_property: Property
) -> None:
    weights, records = expected[VARIANTS[name].case]
    away, way = 0.0, 0.0
    for mine, theirs, before in zip(runs[world][0][name]["weights"], weights, start(VARIANTS[name].case), strict=True):
        away += (mine - theirs).square().sum().item()
        way += (theirs - before).square().sum().item()
    record_property("away", (away / way) ** 0.5)
    assert (away / way) ** 0.5 < BF16_TOLERANCE
    for mine, theirs in zip(runs[world][0][name]["records"], records, strict=True):
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
    """By far more than the tolerance: else the comparison would not see them."""
    assert (
        max((a - b).abs().max().item() for a, b in zip(expected[one][0], expected[other][0], strict=True))
        > 100 * TOLERANCE
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_ranks_agree_exactly(runs: Runs, name: str) -> None:
    first, second = (rank[name] for rank in runs[2])
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    for one, other in zip(first["records"], second["records"], strict=True):
        assert {**one, "stashed": None} == {**other, "stashed": None}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_resuming_repeats_the_trajectory_bitwise(runs: Runs, name: str, world: int) -> None:
    for rank in runs[world]:
        result = rank[name]
        assert result["done"] == STEPS // 2
        assert result["resumed_records"] == result["records"][STEPS // 2 :]
        assert all(torch.equal(a, b) for a, b in zip(result["weights"], result["resumed"], strict=True))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_that_is_not_finite_is_skipped_and_leaves_no_trace(runs: Runs, name: str, world: int) -> None:
    """Each objective in turn, on the last rank only. What follows is bitwise what it was without these steps."""
    count = len(CASES[VARIANTS[name].case].signs)
    for rank in runs[world]:
        assert rank[name]["bad"] == [(k,) for k in range(count)]
        assert rank[name]["resumed_records"] == rank[name]["records"][STEPS // 2 :]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ELASTIC)
def test_another_number_of_ranks_goes_on_from_a_checkpoint(
    elastic: Runs, runs: Runs, name: str, world: int, record_property: Property
) -> None:
    for rank in elastic[world]:
        away = farthest(rank[name], runs[world][0][name]["weights"])
        record_property("away", away)
        assert away < (TOLERANCE if VARIANTS[name].precision == "fp32" else 5e-3)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_extra_memory_is_one_shard_a_forget_objective(runs: Runs, name: str, world: int) -> None:
    """Over all ranks: the trainable numbers once (stage 0: once a rank), and what DeepSpeed pads them with: on stage 1
    each rank's part to a multiple of 2, on stage 3 each tensor to a multiple of the ranks."""
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
        stashed = sum(rank[name]["records"][step]["stashed"] for rank in runs[world])
        assert stashed == (len(case.signs) - 1) * whole * size * copies


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_consolidated_weights_are_the_trained_ones_in_float32(runs: Runs, name: str, world: int) -> None:
    result, bf16 = runs[world][0][name], VARIANTS[name].precision == "bf16"
    for whole, trained in zip(result["whole"], result["weights"], strict=False):
        assert whole.dtype == torch.float32
        assert torch.equal(whole.bfloat16().float() if bf16 else whole, trained)
    assert len(result["whole"]) == len(result["weights"]) - 2


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", FP32)
def test_distance_from_the_start(runs: Runs, name: str, world: int) -> None:
    before, after = start(VARIANTS[name].case)[:-2], runs[world][0][name]["weights"][:-2]
    moved = sum((b - a).square().sum().item() for a, b in zip(before, after, strict=True))
    expected = (moved / sum(a.square().sum().item() for a in before)) ** 0.5
    assert [rank[name]["moved"] for rank in runs[world]] == [pytest.approx(expected, rel=1e-5)] * world


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", OFFLOAD)
def test_an_offloaded_optimizer_steps_exactly_as_another(runs: Runs, name: str, world: int) -> None:
    for rank in runs[world]:
        here, there = rank[name], rank[replace(VARIANTS[name], offload=False).name]
        assert (here["offload"], there["offload"]) == (True, False)
        assert here["records"] == there["records"]
        assert all(torch.equal(a, b) for a, b in zip(here["weights"], there["weights"], strict=True))


@pytest.mark.parametrize("world", WORLDS)
def test_shared_memory_op_stays_disabled(runs: Runs, world: int) -> None:
    """It would be compiled for minutes at the first initialisation; the switch is an internal of DeepSpeed."""
    assert [rank["shm"] for rank in runs[world]] == [(False, False)] * world


def test_every_stage_runs() -> None:
    assert {variant.stage for variant in VARIANTS.values()} == set(STAGES)


@pytest.mark.parametrize("stage", sorted({*STAGES} - {*OFFLOAD_STAGES}))
def test_offload_is_refused_on_the_other_stages(stage: int) -> None:
    with pytest.raises(
        ValidationError, match=f"zero_stage: stage {stage} cannot have offload_optimizer: set zero_stage"
    ):
        TrainingSettings.model_validate({"offload_optimizer": True, "zero_stage": stage})
