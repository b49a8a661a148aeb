"""One job a model: what it takes along, what is refused, and an id that content alone decides."""

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import ValidationError

from expunge.batch.plan import LedgerOf, plan_night
from expunge.errors import UnavailableError
from expunge.runs.outcomes import NightPlan
from expunge.settings import ModelSettings, Settings, TrainingSettings
from expunge.types import ModelVersion, RemovalBatch, RemovalRequest

Ask = Callable[..., RemovalRequest]

CREATED = datetime(2026, 3, 1, tzinfo=UTC)


def night(*requests: RemovalRequest, id: str = "night-1") -> RemovalBatch:
    return RemovalBatch(id=id, created=CREATED, requests=requests)


def nothing(model: str) -> tuple[ModelVersion | None, Sequence[RemovalRequest]]:
    return None, []


def having(version: ModelVersion, *removed: RemovalRequest) -> LedgerOf:
    def of(model: str) -> tuple[ModelVersion | None, Sequence[RemovalRequest]]:
        mine = [request for request in removed if request.model == model]
        return (version, mine) if mine else (None, [])

    return of


def test_groups_by_model_in_the_order_of_the_queue(ask: Ask, settings: Settings) -> None:
    requests = [ask("a", model="faces"), ask("b"), ask("c", model="faces"), ask("d")]
    planned = plan_night(night(*requests), settings, nothing)
    assert [(job.model, [r.id for r in job.requests]) for job in planned.jobs] == [
        ("faces", ["req-a", "req-c"]),
        ("flags", ["req-b", "req-d"]),
    ]
    assert planned.batch == "night-1"
    assert not planned.refused
    assert all(job.ledger == () and job.warm_start is None for job in planned.jobs)


def test_takes_the_resolution_configured_or_the_models_own(ask: Ask, settings: Settings) -> None:
    planned = plan_night(night(ask("a", model="faces"), ask("b")), settings, nothing)
    assert [job.resolution for job in planned.jobs] == [(24, 24), (32, 48)]


def test_takes_the_models_own_training(ask: Ask, settings: Settings) -> None:
    models = {**settings.models, "flags": settings.models["flags"].model_copy(update={"training": {"steps": 7}})}
    planned = plan_night(
        night(ask("a"), ask("b", model="faces")), settings.model_copy(update={"models": models}), nothing
    )
    assert planned.jobs[0].training == settings.training.model_copy(update={"steps": 7})
    assert planned.jobs[1].training.steps == settings.training_for("faces").steps


def test_union_with_the_ledger(ask: Ask, settings: Settings, champion: ModelVersion) -> None:
    ledger = having(champion, ask("old"), ask("older"), ask("elsewhere", model="faces"))
    (job,) = plan_night(night(ask("new")), settings, ledger).jobs
    assert [r.id for r in job.ledger] == ["req-old", "req-older"]
    assert [r.id for r in job.requests] == ["req-new"]
    assert [r.id for r in job.everything] == ["req-old", "req-older", "req-new"]
    assert job.warm_start == "models:/flags/3"


@pytest.mark.parametrize(
    ("new", "old", "warm", "steps"),
    [(4, 0, False, 400), (5, 0, False, 500), (16, 0, False, 1600), (1, 15, True, 400), (1, 15, False, 1600)],
)
def test_steps_grow_with_what_the_first_weights_do_not_remove(
    new: int, old: int, warm: bool, steps: int, ask: Ask, settings: Settings, champion: ModelVersion
) -> None:
    ledger = having(champion, *(ask(f"old-{i}") for i in range(old)))
    (job,) = plan_night(night(*(ask(f"new-{i}") for i in range(new))), settings, ledger).jobs
    assert (job.training.steps, job.training.steps_cover) == (400, 4)
    assert job.steps(warm=warm) == steps


def test_a_request_that_came_back_is_decided_tonight(ask: Ask, settings: Settings, champion: ModelVersion) -> None:
    again = ask("again")
    (job,) = plan_night(night(again), settings, having(champion, again, ask("old"))).jobs
    assert [r.id for r in job.requests] == ["req-again"]
    assert [r.id for r in job.ledger] == ["req-old"]


def test_a_model_that_is_not_configured_is_refused(ask: Ask, settings: Settings) -> None:
    planned = plan_night(night(ask("a", model="birds"), ask("b"), ask("c", model="birds")), settings, nothing)
    assert [job.model for job in planned.jobs] == ["flags"]
    assert planned.refused.keys() == {"req-a", "req-c"}
    assert "'birds' is not configured" in planned.refused["req-a"]


@pytest.mark.parametrize(
    ("index", "why"),
    [
        (None, "model_index.json cannot be read"),
        ("{", "JSONDecodeError"),
        (json.dumps({"_class_name": "FluxPipeline"}), "FluxPipeline is not supported"),
    ],
)
def test_a_model_that_cannot_be_read_is_refused(
    ask: Ask, settings: Settings, tmp_path: Path, index: str | None, why: str
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    if index is not None:
        (folder / "model_index.json").write_text(index)
    models = {**settings.models, "broken": ModelSettings(source=str(folder))}
    planned = plan_night(
        night(ask("a", model="broken"), ask("b")), settings.model_copy(update={"models": models}), nothing
    )
    assert [job.model for job in planned.jobs] == ["flags"]
    assert why in planned.refused["req-a"]


def test_nothing_gives_an_empty_plan(settings: Settings) -> None:
    assert plan_night(night(), settings, nothing) == NightPlan(batch="night-1", jobs=(), refused={})


def test_equal_content_has_the_same_ids(ask: Ask, settings: Settings, champion: ModelVersion) -> None:
    requests, ledger = (ask("a"), ask("b", model="faces")), having(champion, ask("old"))
    first, second = (plan_night(night(*requests), settings, ledger) for _ in range(2))
    assert first == second
    assert NightPlan.model_validate_json(first.model_dump_json()) == first
    read = [job.id for job in NightPlan.model_validate_json(first.model_dump_json()).jobs]
    assert read == [job.id for job in first.jobs]
    assert len(set(read)) == 2


def test_every_difference_is_another_job(ask: Ask, settings: Settings, champion: ModelVersion) -> None:
    other_seed = settings.model_copy(update={"training": settings.training.model_copy(update={"seed": 9})})
    plans = [
        plan_night(night(ask("a")), settings, nothing),
        plan_night(night(ask("a"), id="night-2"), settings, nothing),
        plan_night(night(ask("b")), settings, nothing),
        plan_night(night(ask("a", prompt="a flag")), settings, nothing),
        plan_night(night(ask("a")), settings, having(champion, ask("old"))),
        plan_night(night(ask("a")), other_seed, nothing),
    ]
    ids = [job.id for planned in plans for job in planned.jobs]
    assert len(set(ids)) == len(plans)
    assert all(id.startswith("flags-") for id in ids)


def test_a_batch_that_the_workers_cannot_share_evenly_is_refused() -> None:
    with pytest.raises(ValidationError, match="retain_batch must be a multiple of workers"):
        TrainingSettings(forget_batch=6, retain_batch=8, workers=3)


@pytest.mark.parametrize(
    "index",
    ["", "{", "[]", "{}", "null", '{"_class_name": ["DDPMPipeline"]}', '{"_class_name": {}}', '{"_class_name": 7}'],
)
def test_a_model_with_an_odd_config_is_refused_alone(ask: Ask, settings: Settings, tmp_path: Path, index: str) -> None:
    (tmp_path / "model_index.json").write_text(index)
    models = {**settings.models, "odd": ModelSettings(source=str(tmp_path))}
    batch = night(ask("a", model="odd"), ask("b"), ask("c", model="odd"))
    planned = plan_night(batch, settings.model_copy(update={"models": models}), nothing)
    assert [job.model for job in planned.jobs] == ["flags"]
    assert set(planned.refused) == {"req-a", "req-c"}
    assert not planned.held


def test_a_platform_that_fails_while_planning_refuses_nothing(ask: Ask, settings: Settings) -> None:
    def away(model: str) -> tuple[ModelVersion | None, Sequence[RemovalRequest]]:
        raise UnavailableError("MLflow does not answer")

    with pytest.raises(UnavailableError, match="MLflow does not answer"):
        plan_night(night(ask("a")), settings, away)
