"""The sharded engine on 1 and 2 gloo ranks against plain torch: equal trajectories, exact resumption."""

import copy
import os
import socket
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge.settings import TrainingSettings
from unlearn_kernels import clip_coefficient, combine_, conflicts, cosines, gram, retain_normal

WORKER = Path(__file__).with_name("engine_worker.py")
TIMEOUT_S = 300
# Of the targets, a step each: without gradients of different size AdamW, which divides by it, would hide the clip.
SIZES = (4.0, 0.25, 2.0, 0.5)
STEPS = len(SIZES)

Batch = tuple[Tensor, Tensor]
Objectives = list[Batch]

# float32, and the ranks sum in another order; AdamW divides by the gradient's own size and so magnifies that.
TOLERANCE = 1e-5


def build(sizes: tuple[int, ...], bias: bool) -> nn.Sequential:
    """Odd sizes: two ranks pad the partition, and its boundary falls inside a tensor. The last layer is frozen."""
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(sizes):
        layers += [nn.Linear(wide, narrow, bias=bias), nn.Tanh()]
    frozen = nn.Linear(sizes[-1], sizes[0]).requires_grad_(False)
    return nn.Sequential(*layers, frozen)


def batches(network: nn.Module, width: int, signs: tuple[float, ...], noise: float) -> list[Objectives]:
    """Per step one batch an objective, all on the same inputs; the targets lie `sign` times one direction away."""
    generator = torch.Generator().manual_seed(11)
    steps = []
    for size in SIZES:
        x = torch.randn(6, width, generator=generator)
        with torch.no_grad():
            here = network(x)
        away = size * (1 + 0.1 * torch.randn(here.shape, generator=generator))
        steps.append(
            [(x, here + s * away + size * noise * torch.randn(here.shape, generator=generator)) for s in signs]
        )
    return steps


def case(
    signs: tuple[float, ...], *, sizes: tuple[int, ...] = (5, 7, 3), bias: bool = True, **training: object
) -> dict[str, Any]:
    network = partial(build, sizes, bias)
    return {
        "network": network,
        "batches": batches(network(), sizes[0], signs, noise=0.3),
        "training": TrainingSettings.model_validate({"learning_rate": 1e-2, "forget_batch": 6, **training}),
    }


CASES: dict[str, dict[str, Any]] = {
    "conflict": case((-1, 1), clip=0.05),
    "aligned": case((1, 1), clip=0.05),
    "unclipped": case((-1, 1), clip=1e6),
    "three": case((-1, 1, 1), clip=0.05, forget_weight=0.7),
    "summed": case((-1, 1), clip=0.05, surgery="none"),
    # One trainable number: the second rank's shard is nothing but padding.
    "tiny": case((-1, 1), sizes=(1, 1), bias=False, clip=0.05),
}


def reference(case: dict[str, Any]) -> tuple[list[Tensor], list[dict[str, float | list[float]]]]:
    """The same steps in one process: one `autograd.grad` an objective, surgery on whole gradients, plain AdamW."""
    network, training = case["network"](), case["training"]
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=0.0)
    records: list[dict[str, float | list[float]]] = []
    for step in case["batches"]:
        losses = [nn.functional.mse_loss(network(x), y) for x, y in step]
        gradients = [list(torch.autograd.grad(loss, trained)) for loss in losses]
        matrix = gram(gradients)
        coefficients = torch.tensor(
            [training.forget_weight / (len(step) - 1)] * (len(step) - 1) + [1.0], dtype=torch.float64
        )
        if training.surgery == "retain_normal":
            coefficients = retain_normal(matrix, training.forget_weight)
        combined = copy.deepcopy(gradients[-1])
        combine_(combined, gradients, coefficients * clip_coefficient(matrix, coefficients, training.clip))
        for parameter, gradient in zip(trained, combined, strict=True):
            parameter.grad = gradient
        optimizer.step()
        records.append(
            {
                "losses": [loss.item() for loss in losses],
                "cosine": cosines(matrix).mean().item(),
                "conflict": conflicts(matrix).double().mean().item(),
                "norm": (coefficients @ matrix @ coefficients).clamp_min(0).sqrt().item(),
            }
        )
    return [p.detach() for p in network.parameters()], records


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    """World size: what every rank wrote."""
    folder = tmp_path_factory.mktemp("engine")
    # Plain classes and torch modules alone, hence readable in a process that does not know this file.
    torch.save({n: {**c, "network": _pickled(c["network"])} for n, c in CASES.items()}, folder / "cases.pt")
    started: list[tuple[int, int, subprocess.Popen[str]]] = []
    for world in (1, 2):
        port = _free_port()
        for rank in range(world):
            env = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, str(WORKER), str(folder / "cases.pt"), str(folder)]
            log = (folder / f"world{world}-rank{rank}.log").open("w")
            process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, text=True)
            started.append((world, rank, process))
    try:
        for world, rank, process in started:
            code = process.wait(timeout=TIMEOUT_S)
            assert code == 0, (folder / f"world{world}-rank{rank}.log").read_text()[-4000:]
    finally:
        for _, _, process in started:
            process.kill()
            process.wait()
    return {
        world: [torch.load(folder / f"world{world}-rank{rank}.pt", weights_only=False) for rank in range(world)]
        for world in (1, 2)
    }


def _pickled(network: "partial[nn.Sequential]") -> "partial[nn.Sequential]":
    """A factory that pickles by torch's own classes: a copy of the built module."""
    return partial(copy.deepcopy, network())


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_trajectory_is_that_of_plain_torch(runs: dict[int, list[dict]], name: str, world: int) -> None:
    expected, records = reference(CASES[name])
    for rank in runs[world]:
        for mine, theirs in zip(rank[name]["weights"], expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE)
    moved = [not torch.equal(a, b) for a, b in zip(expected, CASES[name]["network"]().parameters(), strict=True)]
    assert moved == [*[True] * (len(moved) - 2), False, False], "the trainable weights move, the frozen layer does not"
    for step, record in enumerate(records):
        mean = torch.tensor([rank[name]["records"][step]["losses"] for rank in runs[world]]).mean(0)
        torch.testing.assert_close(mean, torch.tensor(record["losses"]), rtol=1e-4, atol=1e-6)
        for figure in ("cosine", "conflict", "norm"):
            assert runs[world][0][name]["records"][step][figure] == pytest.approx(record[figure], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("name", "conflict"), [("conflict", 1.0), ("aligned", 0.0), ("three", 0.5), ("tiny", 1.0)])
def test_the_cases_are_what_they_say(name: str, conflict: float) -> None:
    _, records = reference(CASES[name])
    assert [record["conflict"] for record in records] == [conflict] * STEPS


@pytest.mark.parametrize("without", ["summed", "unclipped"])
def test_surgery_and_clip_change_the_trajectory(without: str) -> None:
    """By far more than the tolerance: else the comparison would not see them."""
    plain, operated = reference(CASES[without])[0], reference(CASES["conflict"])[0]
    assert max((a - b).abs().max().item() for a, b in zip(plain, operated, strict=True)) > 100 * TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_exactly(runs: dict[int, list[dict]], name: str) -> None:
    first, second = (rank[name] for rank in runs[2])
    assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
    for one, other in zip(first["records"], second["records"], strict=True):
        assert {**one, "losses": None} == {**other, "losses": None}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_resuming_repeats_the_trajectory_bitwise(runs: dict[int, list[dict]], name: str, world: int) -> None:
    for rank in runs[world]:
        result = rank[name]
        assert result["done"] == STEPS // 2
        assert result["resumed_records"] == result["records"][STEPS // 2 :]
        assert all(torch.equal(a, b) for a, b in zip(result["weights"], result["resumed"], strict=True))


@pytest.mark.parametrize("world", [1, 2])
def test_shared_memory_op_stays_disabled(runs: dict[int, list[dict]], world: int) -> None:
    """It would be compiled for minutes at the first initialisation; the switch is an internal of DeepSpeed."""
    assert [rank["shm"] for rank in runs[world]] == [(False, False)] * world
