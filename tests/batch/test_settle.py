"""How a night ends for each request, on a real store: the fates, and that settling twice is settling once."""

from collections.abc import Callable
from typing import Any

import pytest

from expunge.batch.plan import plan_night
from expunge.batch.settle import settle
from expunge.requests.records import RequestRecord
from expunge.requests.store import RequestStore
from expunge.runs.outcomes import JobOutcome, NightOutcome, NightPlan
from expunge.settings import Settings
from expunge.types import (
    Basis,
    Evidence,
    ModelVersion,
    RemovalBatch,
    RemovalRequest,
    RequestEvidence,
    RequestState,
)
from tests import evidence as made

Ask = Callable[..., RemovalRequest]
Judge = Callable[..., Evidence]

ACCEPTED, REMOVED, FAILED = RequestState.ACCEPTED, RequestState.REMOVED, RequestState.FAILED
NOT_REPRODUCED = RequestState.NOT_REPRODUCED


def drained(store: RequestStore, settings: Settings, *requests: RemovalRequest) -> tuple[RemovalBatch, NightPlan]:
    """Tonight's batch, and its plan without a ledger."""
    for request in requests:
        store.add(request)
    batch = store.drain(None)
    return batch, plan_night(batch, settings, lambda model: (None, []))


def states(store: RequestStore) -> dict[str, RequestState]:
    return {record.request.id.removeprefix("req-"): record.state for record in store.list()}


def test_each_request_by_its_verdict(
    store: RequestStore, settings: Settings, ask: Ask, judge: Judge, champion: ModelVersion
) -> None:
    batch, planned = drained(store, settings, ask("good"), ask("bad"), ask("odd"))
    evidence = judge(planned.jobs[0], bad="failed", odd="skipped")
    settle(store, settings, batch, planned, [JobOutcome(job=planned.jobs[0], evidence=evidence, version=champion)])
    assert states(store) == {"good": REMOVED, "bad": ACCEPTED, "odd": FAILED}
    for name in ("good", "bad", "odd"):
        record = store.get(f"req-{name}")
        assert record.history[-1].detail == f"measured req-{name}"
        assert record.evidence is not None
        assert record.evidence["version"] == "models:/flags/3"
        assert record.evidence["request"] == f"req-{name}"
        assert record.batch == batch.id
    assert [store.get(f"req-{name}").attempts for name in ("good", "bad", "odd")] == [0, 1, 1]
    store.close_batch(batch.id)


@pytest.mark.parametrize("trained", [True, False])
def test_what_the_base_model_does_not_reproduce_is_final_and_no_attempt(
    store: RequestStore, settings: Settings, ask: Ask, judge: Judge, champion: ModelVersion, trained: bool
) -> None:
    """Whether others of its job were trained for or not; only a person may try again, or withdraw it."""
    batch, planned = drained(store, settings, ask("good"), ask("none"))
    others = {} if trained else {"good": "not_reproduced"}
    evidence = judge(planned.jobs[0], trained=trained, none="not_reproduced", **others)
    version = champion if trained else None
    settle(store, settings, batch, planned, [JobOutcome(job=planned.jobs[0], evidence=evidence, version=version)])
    assert states(store) == {"good": REMOVED if trained else NOT_REPRODUCED, "none": NOT_REPRODUCED}
    record = store.get("req-none")
    assert (record.attempts, record.history[-1].detail) == (0, "measured req-none")
    assert record.evidence is not None
    assert record.evidence["verdict"] == "not_reproduced"
    store.close_batch(batch.id)
    assert store.drain(None).requests == ()
    store.transition("req-none", ACCEPTED, attempt=False)
    assert [request.id for request in store.drain(None).requests] == ["req-none"]


def test_a_pass_without_evidence_about_unrelated_outputs_removes_nothing(
    store: RequestStore, settings: Settings, ask: Ask, judge: Judge, champion: ModelVersion
) -> None:
    batch, planned = drained(store, settings, ask("good"))
    evidence = judge(planned.jobs[0], trained=False)
    settle(store, settings, batch, planned, [JobOutcome(job=planned.jobs[0], evidence=evidence, version=champion)])
    assert states(store) == {"good": ACCEPTED}
    assert "no evidence about unrelated outputs" in store.get("req-good").history[-1].detail


def test_a_request_keeps_its_rules_its_conditions_and_what_they_rest_on(
    store: RequestStore, settings: Settings, ask: Ask, champion: ModelVersion
) -> None:
    batch, planned = drained(store, settings, ask("good"))
    (job,) = planned.jobs
    evidence = made.evidence(job.id, made.judged("req-good"), loosened=("seeds 8 instead of 9",))
    settle(store, settings, batch, planned, [JobOutcome(job=job, evidence=evidence, version=champion)])
    kept = store.get("req-good").evidence
    assert kept is not None
    assert (
        RequestEvidence.model_validate({name: kept[name] for name in RequestEvidence.model_fields})
        == (evidence.requests[0])
    )
    assert Basis.model_validate(kept["basis"]) == evidence.basis
    assert kept["protocol_version"] == 2


@pytest.mark.parametrize("attempts", [1, 2, 3])
def test_goes_back_to_the_queue_until_a_person_is_needed(
    store: RequestStore, settings: Settings, ask: Ask, judge: Judge, attempts: int
) -> None:
    gate = settings.gate.model_copy(update={"max_attempts": attempts})
    strict = settings.model_copy(update={"gate": gate})
    store.add(ask("bad"))
    for left in reversed(range(attempts)):
        batch = store.drain(None)
        planned = plan_night(batch, strict, lambda model: (None, []))
        (job,) = planned.jobs
        settle(store, strict, batch, planned, [JobOutcome(job=job, evidence=judge(job, bad="failed"))])
        store.close_batch(batch.id)
        assert states(store) == {"bad": ACCEPTED if left else FAILED}
    assert store.get("req-bad").attempts == attempts


def test_the_models_own_gate_counts(store: RequestStore, settings: Settings, ask: Ask, judge: Judge) -> None:
    flags = settings.models["flags"].model_copy(update={"gate": {"max_attempts": 1}})
    own = settings.model_copy(update={"models": {**settings.models, "flags": flags}})
    batch, planned = drained(store, own, ask("bad"), ask("face", model="faces"))
    outcomes = [JobOutcome(job=job, evidence=judge(job, bad="failed", face="failed")) for job in planned.jobs]
    settle(store, own, batch, planned, outcomes)
    assert states(store) == {"bad": FAILED, "face": ACCEPTED}


@pytest.mark.parametrize(
    ("error", "platform", "state", "detail"),
    [
        ("training failed: worker lost", True, ACCEPTED, "worker lost"),
        (None, False, ACCEPTED, "the job left no evidence"),
        ("model: no weights", False, FAILED, "no weights"),
    ],
)
def test_only_what_is_no_fault_of_the_platform_counts_as_an_attempt(
    store: RequestStore,
    settings: Settings,
    ask: Ask,
    error: str | None,
    platform: bool,
    state: RequestState,
    detail: str,
) -> None:
    settings = settings.model_copy(update={"gate": settings.gate.model_copy(update={"max_attempts": 1})})
    batch, planned = drained(store, settings, ask("a"), ask("b"))
    settle(store, settings, batch, planned, [JobOutcome(job=planned.jobs[0], error=error, platform=platform)])
    assert states(store) == {"a": state, "b": state}
    record = store.get("req-a")
    assert detail in record.history[-1].detail
    assert record.evidence is None
    assert record.attempts == (state is FAILED)


def test_requests_of_a_job_that_has_no_outcome_yet_stay_in_the_batch(
    store: RequestStore, settings: Settings, ask: Ask, judge: Judge, champion: ModelVersion
) -> None:
    batch, planned = drained(store, settings, ask("flag"), ask("face", model="faces"))
    ended = JobOutcome(job=planned.jobs[0], evidence=judge(planned.jobs[0]), version=champion)
    settle(store, settings, batch, planned, [ended])
    assert states(store) == {"flag": REMOVED, "face": RequestState.BATCHED}


def test_a_model_that_stays_wrong_is_left_to_a_person(store: RequestStore, settings: Settings, ask: Ask) -> None:
    store.add(ask("bird", model="birds"))
    for night in range(1, settings.gate.max_attempts + 1):
        batch = store.drain(None)
        settle(store, settings, batch, plan_night(batch, settings, lambda model: (None, [])), [])
        store.close_batch(batch.id)
        assert store.get("req-bird").attempts == night
    assert states(store) == {"bird": FAILED}


def test_what_the_store_lacks_holds_one_model_back(store: RequestStore, settings: Settings, ask: Ask) -> None:
    def ledger(model: str) -> tuple[None, list[RemovalRequest]]:
        return None, [store.get("req-older").request] if model == "flags" else []

    for request in (ask("flag"), ask("face", model="faces")):
        store.add(request)
    batch = store.drain(None)
    planned = plan_night(batch, settings, ledger)
    assert [job.model for job in planned.jobs] == ["faces"]
    settle(store, settings, batch, planned, [])
    record = store.get("req-flag")
    assert (record.state, record.attempts) == (ACCEPTED, 0)
    assert "'req-older' does not exist" in record.history[-1].detail


@pytest.mark.parametrize(
    ("intact", "aliases", "detail"),
    [(False, ("champion",), "PSNR 12 is below 20"), (True, (), "another night changed the champion meanwhile")],
)
def test_without_a_proven_and_promoted_version_nothing_is_removed(
    store: RequestStore,
    settings: Settings,
    ask: Ask,
    judge: Judge,
    champion: ModelVersion,
    intact: bool,
    aliases: tuple[str, ...],
    detail: str,
) -> None:
    batch, planned = drained(store, settings, ask("good"))
    evidence = judge(planned.jobs[0], intact=intact)
    version = champion.model_copy(update={"aliases": aliases})
    settle(store, settings, batch, planned, [JobOutcome(job=planned.jobs[0], evidence=evidence, version=version)])
    assert states(store) == {"good": ACCEPTED}
    assert detail in store.get("req-good").history[-1].detail


def test_a_refused_request_waits_with_its_reason(store: RequestStore, settings: Settings, ask: Ask) -> None:
    batch, planned = drained(store, settings, ask("bird", model="birds"))
    settle(store, settings, batch, planned, [])
    assert states(store) == {"bird": ACCEPTED}
    assert "'birds' is not configured" in store.get("req-bird").history[-1].detail


def settled(store: RequestStore) -> list[str]:
    return [record.model_dump_json() for record in store.list()]


def test_settling_again_changes_nothing(
    store: RequestStore, settings: Settings, ask: Ask, judge: Judge, champion: ModelVersion
) -> None:
    batch, planned = drained(store, settings, ask("good"), ask("bad"), ask("odd"), ask("bird", model="birds"))
    evidence = judge(planned.jobs[0], bad="failed", odd="skipped")
    outcomes = [JobOutcome(job=planned.jobs[0], evidence=evidence, version=champion)]
    settle(store, settings, batch, planned, outcomes)
    before = settled(store)
    settle(store, settings, batch, planned, outcomes)
    assert settled(store) == before


@pytest.mark.parametrize("survived", [0, 1, 2])
def test_a_kill_in_the_middle_is_made_up_for(
    store: RequestStore,
    settings: Settings,
    ask: Ask,
    judge: Judge,
    champion: ModelVersion,
    survived: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, planned = drained(store, settings, ask("good"), ask("bad"), ask("odd"))
    evidence = judge(planned.jobs[0], bad="failed", odd="skipped")
    outcomes = [JobOutcome(job=planned.jobs[0], evidence=evidence, version=champion)]
    transition, calls = store.transition, []

    def killed(request: str, to: RequestState, **details: Any) -> RequestRecord:
        calls.append(request)
        if len(calls) > survived:
            raise KeyboardInterrupt("killed")
        return transition(request, to, **details)

    with monkeypatch.context() as patch:
        patch.setattr(store, "transition", killed)
        with pytest.raises(KeyboardInterrupt, match="killed"):
            settle(store, settings, batch, planned, outcomes)
    settle(store, settings, batch, planned, outcomes)
    assert states(store) == {"good": REMOVED, "bad": ACCEPTED, "odd": FAILED}
    assert [store.get(f"req-{name}").attempts for name in ("good", "bad", "odd")] == [0, 1, 1]
    assert {len(record.history) for record in store.list()} == {3}


def test_a_request_that_a_later_night_has_is_left_to_it(
    store: RequestStore, settings: Settings, ask: Ask, judge: Judge
) -> None:
    batch, planned = drained(store, settings, ask("bad"))
    outcomes = [JobOutcome(job=planned.jobs[0], evidence=judge(planned.jobs[0], bad="failed"))]
    settle(store, settings, batch, planned, outcomes)
    store.close_batch(batch.id)
    later = store.drain(None)
    assert later.id != batch.id
    before = settled(store)
    settle(store, settings, batch, planned, outcomes)
    assert settled(store) == before
    assert states(store) == {"bad": RequestState.BATCHED}


@pytest.mark.parametrize(
    ("refused", "verdict", "promoted", "expected"),
    [
        ({}, "passed", True, True),
        ({"req-bird": "not configured"}, "passed", True, False),
        ({}, "failed", True, False),
        ({}, "passed", False, False),
        ({}, "not_reproduced", True, False),  # nobody may read it as "removed"
    ],
)
def test_all_passed(
    settings: Settings,
    store: RequestStore,
    ask: Ask,
    judge: Judge,
    champion: ModelVersion,
    refused: dict[str, str],
    verdict: str,
    promoted: bool,
    expected: bool,
) -> None:
    batch, planned = drained(store, settings, ask("a"))
    (job,) = planned.jobs
    outcome = JobOutcome(job=job, evidence=judge(job, a=verdict), version=champion if promoted else None)
    night = NightOutcome(batch=batch.id, jobs=planned.jobs, refused=refused, outcomes=(outcome,))
    assert night.all_passed is expected


def test_what_is_left_to_do_and_what_is_not_reproduced_are_told_apart(
    settings: Settings, store: RequestStore, ask: Ask, judge: Judge, champion: ModelVersion
) -> None:
    batch, planned = drained(store, settings, ask("good"), ask("bad"), ask("none"))
    (job,) = planned.jobs
    outcome = JobOutcome(job=job, evidence=judge(job, bad="failed", none="not_reproduced"), version=champion)
    night = NightOutcome(batch=batch.id, jobs=planned.jobs, refused={}, held={"req-x": "waits"}, outcomes=(outcome,))
    assert night.left == {"req-bad", "req-x"}
    assert night.not_reproduced == {"req-none"}


def test_what_is_held_back_names_the_earlier_removals_that_were_not_proven_again(
    store: RequestStore, settings: Settings, ask: Ask, judge: Judge, champion: ModelVersion
) -> None:
    store.add(ask("new"))
    batch = store.drain(None)
    planned = plan_night(batch, settings, lambda model: (champion, [ask("old"), ask("older")]))
    (job,) = planned.jobs
    version = champion.model_copy(update={"aliases": ("candidate",)})
    settle(store, settings, batch, planned, [JobOutcome(job=job, evidence=judge(job, old="skipped"), version=version)])
    assert states(store) == {"new": ACCEPTED}
    assert store.get("req-new").history[-1].detail == ("not promoted: earlier removals were not proven again: req-old")
