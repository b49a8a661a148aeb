"""The adaptive budget: its probes, and trainings that it ends, whatever the ranks, the ZeRO stage, or a restart."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from expunge.families import load_model, preflight
from expunge.families.base import Conditioning
from expunge.preparation.dataset import ForgetSet, RetainSet, store_set, store_tensors
from expunge.requests.blobs import open_blobs
from expunge.runs.job import JobFolder
from expunge.settings import MethodSettings, ShardingSettings, TrainingSettings, load_settings
from expunge.testbed import faces, flags
from expunge.types import Hotfix, PreparedJob, RemovalRequest, UnlearnJob
from expunge.unlearning.budget import LEVELS, Budget
from expunge.unlearning.losses import Losses
from tests.unlearning.budget_worker import BREAK
from tests.unlearning.conftest import Toy
from tests.unlearning.groups import run_group, starts_groups
from tests.watching import recorded

# Three of a job's four requests have rows: 1, 2 and 4 of them.
REQUEST = torch.tensor([0, 1, 1, 3, 3, 3, 3])


class Answering(Toy):
    """Sees in any noised target a picture that lies `reached` [N] of the way from target to surrogate, row by row."""

    def __init__(self, family: Any, reached: list[float]) -> None:
        super().__init__(family)
        x_f, x_s = torch.randn(2, len(REQUEST), *self.latent_shape, generator=torch.Generator().manual_seed(1))
        self.forget = ForgetSet(x_f, x_s, torch.arange(len(REQUEST)), REQUEST)
        self.seen = x_f + torch.tensor(reached).view(-1, 1, 1, 1) * (x_s - x_f)
        self.asked: list[int] = []

    def predict(self, x_t: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        self.asked.append(len(x_t))
        at = self.at(time)
        a, b, alpha, beta = (v.view(-1, 1, 1, 1) for v in (at.a, at.b, at.alpha, at.beta))
        clean = self.seen[conditioning["row"]]
        return alpha * (x_t - a * clean) / b + beta * clean


def alone(values: Tensor) -> Tensor:
    """Sum over one rank."""
    return values


def budget_of(
    model: Answering,
    *,
    rank: int = 0,
    world: int = 1,
    total: Callable[[Tensor], Tensor] = alone,
    **training: object,
) -> Budget:
    settings = TrainingSettings.model_validate({"adaptive": True, "forgotten_at": 0.6, **training})
    losses = Losses(model, nullcontext, settings, {"row": torch.arange(len(REQUEST))})
    return Budget(losses, settings, model.forget, total, rank, world)


@pytest.mark.parametrize("family", ["flow", "epsilon", "v_prediction"])
def test_progress_is_the_way_from_target_to_surrogate(family: str) -> None:
    budget = budget_of(Answering(family, [0.0, 0.2, 0.6, 1.0, 1.0, 1.0, 1.0]))
    figures = budget.probe()
    assert budget.missing.tolist() == pytest.approx([1, 0.6, 0, 0], abs=1e-5)
    assert figures["budget/forgotten"] == 1
    assert figures["budget/progress_min"] == pytest.approx(0, abs=1e-5)
    assert figures["budget/progress_mean"] == pytest.approx((0 + 0.4 + 1) / 3, abs=1e-5)
    assert not budget.spent


def test_training_is_over_when_all_are_forgotten() -> None:
    budget = budget_of(Answering("flow", [0.7] * len(REQUEST)))
    budget.probe()
    assert budget.spent


def test_a_request_comes_back_when_it_is_no_longer_forgotten() -> None:
    model = Answering("flow", [1.0] * len(REQUEST))
    budget = budget_of(model)
    budget.probe()
    model.seen = model.forget.x_f
    budget.probe()
    assert budget.missing.tolist() == pytest.approx([1, 1, 0, 1], abs=1e-5)


def test_progress_beyond_the_ends_counts_as_none_or_all() -> None:
    budget = budget_of(Answering("flow", [-0.5, 0.5, 0.5, 1.5, 1.5, 1.5, 1.5]), forgotten_at=1)
    budget.probe()
    assert budget.missing.tolist() == pytest.approx([1, 0.5, 0, 0], abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_request_without_a_finite_progress_is_not_forgotten(bad: float) -> None:
    budget = budget_of(Answering("flow", [1.0, 1.0, 1.0, 1.0, bad, 1.0, 1.0]))
    figures = budget.probe()
    assert budget.missing.tolist() == [0, 0, 0, 1]
    assert figures["budget/forgotten"] == 2
    assert figures["budget/progress_min"] == 0


@pytest.mark.parametrize(("world", "micro"), [(2, 0), (2, 3), (3, 1), (4, 0), (20, 0)])
def test_every_rank_makes_as_many_passes_and_they_add_up(world: int, micro: int) -> None:
    """The sum over the ranks is made here, from what each of them adds to it."""
    reached = torch.rand(len(REQUEST), generator=torch.Generator().manual_seed(2)).tolist()
    single = budget_of(Answering("flow", reached))
    figures = single.probe()
    parts: list[Tensor] = []
    asked: list[list[int]] = []

    def record(values: Tensor) -> Tensor:
        parts.append(values)
        return values

    for rank in range(world):
        model = Answering("flow", reached)
        budget_of(model, rank=rank, world=world, total=record, micro_batch=micro).probe()
        asked.append(model.asked)
    assert all(mine == asked[0] for mine in asked)
    assert sum(asked[0]) * world < len(REQUEST) * len(LEVELS) + world
    whole = torch.stack(parts).sum(0)
    together = budget_of(Answering("flow", reached), rank=world - 1, world=world, total=lambda values: whole)
    assert together.probe() == {**figures, "budget/probe_s": pytest.approx(0, abs=60)}
    assert torch.equal(together.missing, single.missing)


def test_a_probe_is_repeated_exactly_whatever_was_drawn_between() -> None:
    torch.manual_seed(3)
    model = Toy("epsilon")
    answers = []
    x_f, x_s = torch.randn(2, 3, *model.latent_shape)
    data = ForgetSet(x_f, x_s, torch.zeros(3, dtype=torch.long), torch.arange(3))
    for _ in range(2):
        losses = Losses(model, nullcontext, MethodSettings(adaptive=True), model.condition([""]))
        budget = Budget(losses, ShardingSettings(), data, alone, 0, 1)
        answers.append((budget.probe()["budget/progress_mean"], budget.missing.tolist()))
        torch.randn(7)
    assert answers[0] == answers[1]


def test_probes_are_at_every_checkpoint() -> None:
    TrainingSettings(adaptive=True, probe_every=25, checkpoint_every=50)
    TrainingSettings(adaptive=False, probe_every=7, checkpoint_every=50)
    with pytest.raises(ValidationError, match="probe_every: 20 does not divide checkpoint_every"):
        TrainingSettings(adaptive=True, probe_every=20, checkpoint_every=50)


# Whole trainings by the loop itself: on one rank, and on two at another ZeRO stage; of each model one is broken off.
ROWS = torch.tensor([0, 1, 1, 2])
TRAININGS: dict[str, dict[str, Any]] = {
    "flags": {"world": 1, "zero_stage": 0},
    "flags-off": {"world": 1, "zero_stage": 0, "adaptive": False, "steps": 6},
    "flags-pair-again": {"world": 2, "zero_stage": 3, BREAK: True},
    "faces": {"world": 1, "zero_stage": 1},
    "faces-again": {"world": 1, "zero_stage": 1, BREAK: True},
}
ADAPTIVE = [name for name, changes in TRAININGS.items() if changes.get("adaptive", True)]
SHORT = {
    "adaptive": True,
    "steps": 16,
    "probe_every": 2,
    "checkpoint_every": 4,
    "forget_batch": 8,
    "retain_batch": 4,
    "forget_target": "surrogate",
}
# Never `auto`, which would start a Ray on every rank to ask it for the memory.
OF_MODEL: dict[str, dict[str, Any]] = {
    "faces": {"learning_rate": 5e-4, "retain_target": "data", "forgotten_at": 0.3, "objectives": "batch"},
    "flags": {"learning_rate": 5e-3, "lora_rank": 4, "forgotten_at": 0.22, "objectives": "request"},
}


def model_of(name: str) -> str:
    return name.split("-")[0]


def write_job(folder: Path, name: str) -> None:
    """Three requests, of 1, 2 and 1 pictures that the model was trained on, to become others."""
    changes = {key: value for key, value in TRAININGS[name].items() if key not in ("world", BREAK)}
    model_name = model_of(name)
    settings = load_settings()
    blobs, options = open_blobs(settings), settings.model(model_name)
    resolution = preflight("test", options)
    model = load_model(options, resolution)
    pictures = faces.images() if model_name == "faces" else flags.images()[0]
    x_f, x_s, x_0 = (model.encode(pictures[first : first + len(ROWS)]) for first in (0, 20, 40))
    prompt = torch.zeros(len(ROWS), dtype=torch.long)
    ids = [f"request-{i}" for i in range(3)]
    job = UnlearnJob(
        batch="budget",
        model=model_name,
        source=options.source,
        resolution=resolution,
        requests=tuple(RemovalRequest(id=i, model=model_name, images=("0" * 64,), external_id="x") for i in ids),
        training=TrainingSettings.model_validate({**SHORT, **OF_MODEL[model_name], **changes}),
    )
    prepared = PreparedJob(
        job=job.id,
        forget=store_set(blobs, ForgetSet(x_f, x_s, prompt, ROWS)),
        retain=store_set(blobs, RetainSet(x_0, prompt)),
        conditioning=store_tensors(blobs, model.condition([""]) or {"nothing": torch.zeros(1)}),
        unrelated_prompts=1,
        surrogates={},
    )
    JobFolder(folder).job.write(job)
    JobFolder(folder).prepared.write(prepared)
    if BREAK in TRAININGS[name]:
        (folder / BREAK).touch()


@dataclass(frozen=True)
class Run:
    figures: list[dict[str, float]]
    hotfix: Hotfix
    weights: dict[str, Tensor]

    @property
    def by_step(self) -> dict[float, dict[str, float]]:
        """A training that is resumed probes once more at the step that it resumes from."""
        merged: dict[float, dict[str, float]] = {}
        for line in self.figures:
            merged[line["step"]] = {**merged.get(line["step"], {}), **line}
        return merged

    @property
    def probes(self) -> list[dict[str, float]]:
        return [line for line in self.figures if "budget/forgotten" in line]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("budget")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPUNGE_HOME", str(folder / "home"))
        for world in (1, 2):
            jobs, names = folder / f"world{world}", [n for n in TRAININGS if TRAININGS[n]["world"] == world]
            for name in names:
                write_job(jobs / name, name)
            run_group("budget_worker.py", str(jobs), world=world, logs=folder)
            found |= {name: read(jobs / name) for name in names}
    return found


def read(folder: Path) -> Run:
    lines = recorded(folder)
    for line in lines:
        line.pop("budget/probe_s", None)
    hotfix = JobFolder(folder).hotfix.expect()
    [weights] = hotfix.path.rglob("*.safetensors")
    return Run(lines, hotfix, load_file(weights))


@starts_groups
@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTIVE)
def test_requests_leave_and_training_ends_when_none_is_left(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    forgotten = [probe["budget/forgotten"] for probe in run.probes]
    assert forgotten[0] == 0
    assert set(forgotten) & {1, 2}, "they leave one by one"
    assert forgotten[-1] == 3
    assert run.hotfix.steps == run.figures[-1]["step"] == run.probes[-1]["step"] < SHORT["steps"]
    assert run.probes[-1]["budget/progress_min"] >= OF_MODEL[model_of(name)]["forgotten_at"]
    assert "loss/forget" in run.figures[-1]


@starts_groups
@pytest.mark.slow
def test_a_request_that_has_left_has_no_gradient(runs: dict[str, Run]) -> None:
    for before, after in pairwise(runs["flags"].probes):
        assert after["surgery/objectives"] == 3 - before["budget/forgotten"]


@starts_groups
@pytest.mark.slow
def test_the_ranks_the_stage_and_a_restart_change_nothing_but_rounding(runs: dict[str, Run]) -> None:
    mine, theirs = runs["flags-pair-again"].by_step, runs["flags"].by_step
    assert mine.keys() == theirs.keys()
    for step, line in theirs.items():
        assert mine[step].get("budget/forgotten") == line.get("budget/forgotten")
        for figure in {"budget/progress_min", "budget/progress_mean", "loss/forget", "loss/retain"} & line.keys():
            assert mine[step][figure] == pytest.approx(line[figure], rel=2e-3, abs=1e-5), (step, figure)


@starts_groups
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ADAPTIVE if BREAK in TRAININGS[name]])
def test_a_training_that_is_broken_off_goes_on_from_its_checkpoint(runs: dict[str, Run], name: str) -> None:
    steps = [line["step"] for line in runs[name].figures]
    assert steps.count(4) == 2, "it was broken off at step 4"
    # What is recorded on the way back holds no step, so only the probe of that step is there twice.
    first, second = (line for line in runs[name].figures if line["step"] == 4)
    assert second.items() <= first.items()


@starts_groups
@pytest.mark.slow
def test_a_training_that_is_resumed_ends_with_the_same_weights(runs: dict[str, Run]) -> None:
    again, straight = runs["faces-again"], runs["faces"]
    after = [[line for line in run.figures if line["step"] > 4] for run in (again, straight)]
    assert after[0] == after[1]
    assert again.weights.keys() == straight.weights.keys()
    assert all(torch.equal(again.weights[key], straight.weights[key]) for key in straight.weights)


@starts_groups
@pytest.mark.slow
def test_without_it_nothing_is_probed_and_all_steps_are_made(runs: dict[str, Run]) -> None:
    run = runs["flags-off"]
    assert run.hotfix.steps == 6
    assert [line["step"] for line in run.figures] == [5, 6]
    assert run.probes == []
