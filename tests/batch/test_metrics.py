"""What a night says to Prometheus: the values, and that Ray's endpoint has them."""

import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from expunge.batch import metrics
from expunge.requests.store import RequestStore
from expunge.runs.outcomes import JobOutcome
from expunge.settings import Settings
from expunge.types import Evidence, RemovalRequest, RequestState, UnlearnJob

Ask = Callable[..., RemovalRequest]
Judge = Callable[..., Evidence]
Said = dict[tuple[str, ...], float]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    """(name, labels in order) to the last value."""
    values: Said = {}

    def put(name: str, value: float, **labels: str) -> None:
        assert tuple(labels) == metrics.METRICS[name][1]
        values[(name, *labels.values())] = value

    monkeypatch.setattr(metrics, "put", put)
    return values


def test_the_queue_is_what_is_not_decided(store: RequestStore, settings: Settings, ask: Ask, said: Said) -> None:
    for name in "abc":
        store.add(ask(name))
    store.drain("night-1", limit=2)
    store.transition("req-a", RequestState.REMOVED)
    metrics.report_queue(store, settings, datetime.now(UTC) + timedelta(hours=2))
    assert said[("expunge_queue_depth", "flags")] == 2
    assert said[("expunge_queue_oldest_seconds", "flags")] == pytest.approx(7200, abs=60)


def test_a_queue_that_is_empty_says_so(store: RequestStore, settings: Settings, said: Said) -> None:
    """Else the value from before the night would stand."""
    metrics.report_queue(store, settings)
    for model in ("faces", "flags"):
        assert said[("expunge_queue_depth", model)] == 0
        assert said[("expunge_queue_oldest_seconds", model)] == 0
        assert said[("expunge_queue_due_days", model)] == metrics.NOTHING_DUE


@pytest.mark.parametrize(("due", "days"), [("2026-03-10", 1), ("2026-03-12", 3), ("2026-03-08", -1)])
def test_a_due_date_is_met_until_it_ends(
    store: RequestStore, settings: Settings, ask: Ask, said: Said, due: str, days: int
) -> None:
    store.add(ask("a", due=due))
    store.add(ask("b", due="2026-04-01"))
    store.add(ask("c"))
    metrics.report_queue(store, settings, datetime(2026, 3, 10, tzinfo=UTC))
    assert said[("expunge_queue_due_days", "flags")] == pytest.approx(days)


def test_a_request_that_waits_for_a_person_is_still_due(
    store: RequestStore, settings: Settings, ask: Ask, said: Said
) -> None:
    store.add(ask("a", due="2026-03-12"))
    store.drain("night-1")
    store.transition("req-a", RequestState.FAILED)
    metrics.report_queue(store, settings, datetime(2026, 3, 10, tzinfo=UTC))
    assert said[("expunge_queue_depth", "flags")] == 0
    assert said[("expunge_queue_due_days", "flags")] == pytest.approx(3)


def test_a_model_that_is_no_longer_configured_keeps_its_queue(
    store: RequestStore, settings: Settings, ask: Ask, said: Said
) -> None:
    store.add(ask("a", model="gone"))
    metrics.report_queue(store, settings)
    assert said[("expunge_queue_depth", "gone")] == 1


@pytest.fixture
def job(ask: Ask, settings: Settings) -> UnlearnJob:
    return UnlearnJob(
        batch="night-2",
        model="flags",
        source="testbed:flags",
        resolution=(32, 48),
        requests=(ask("new"), ask("other")),
        ledger=(ask("old"), ask("older")),
        training=settings.training,
    )


def test_what_failed_and_what_came_back_are_two_things(job: UnlearnJob, judge: Judge, said: Said) -> None:
    metrics.report_outcomes([JobOutcome(job=job, evidence=judge(job, new="failed", old="failed"))])
    assert said[("expunge_gate_failures", "flags")] == 1
    assert said[("expunge_resurfaced", "flags")] == 1
    assert said[("expunge_job_errors", "flags")] == 0


def test_what_is_not_reproduced_is_no_failure(job: UnlearnJob, judge: Judge, said: Said) -> None:
    metrics.report_outcomes([JobOutcome(job=job, evidence=judge(job, new="not_reproduced", other="failed"))])
    assert said[("expunge_gate_failures", "flags")] == 1
    assert said[("expunge_not_reproduced", "flags")] == 1
    metrics.report_outcomes([JobOutcome(job=job, evidence=judge(job))])
    assert said[("expunge_not_reproduced", "flags")] == 0


def test_a_model_that_is_damaged_fails_every_request_and_resurfaces_none(
    job: UnlearnJob, judge: Judge, said: Said
) -> None:
    metrics.report_outcomes([JobOutcome(job=job, evidence=judge(job, intact=False))])
    assert said[("expunge_gate_failures", "flags")] == 2
    assert said[("expunge_resurfaced", "flags")] == 0


def test_a_job_without_evidence_is_an_error_and_no_verdict(job: UnlearnJob, said: Said) -> None:
    metrics.report_outcomes([JobOutcome(job=job, error="no GPU")])
    assert said == {("expunge_job_errors", "flags"): 1}


def test_a_stage_that_fails_has_no_duration(said: Said) -> None:
    with metrics.timed("flags", "prepare"):
        time.sleep(0.05)
    assert 0.05 <= said[("expunge_stage_seconds", "flags", "prepare")] < 5
    with pytest.raises(RuntimeError, match="lost"), metrics.timed("flags", "train"):
        raise RuntimeError("lost")
    assert ("expunge_stage_seconds", "flags", "train") not in said


def test_the_rate_is_between_two_reports(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 102.0, 103.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    rate = metrics.TrainingRate("flags")
    rate(50, {"surgery/conflict": 0.25})
    assert ("expunge_train_steps_per_second", "flags") not in said
    assert said[("expunge_train_conflict_rate", "flags")] == 0.25
    rate(55, {})
    assert said[("expunge_train_steps_per_second", "flags")] == 2.5
    rate(10, {})  # a worker that went back to its checkpoint
    assert said[("expunge_train_steps_per_second", "flags")] == 2.5


EXPORT = """
import sys, time, ray
from expunge.batch import metrics
ray.init("local", num_cpus=1, include_dashboard=False, _metrics_export_port=int(sys.argv[1]), log_to_driver=False)
for name, (_, labels) in metrics.METRICS.items():
    metrics.put(name, 2.5, **{label: "x" for label in labels})
metrics.put("expunge_queue_due_days", metrics.NOTHING_DUE, model="none")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
def test_rays_endpoint_has_them_all() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", EXPORT, str(port)]
    token = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
    }  # else Ray leaves one in the user's home
    environment = {**os.environ, **token}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            wanted = [f"ray_{name}{{" for name in metrics.METRICS] + ['model="none"']
            text, deadline = "", time.monotonic() + 90
            while any(word not in text for word in wanted) and time.monotonic() < deadline:
                time.sleep(1)
                text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
        finally:
            process.communicate(timeout=60)
    mine = [line for line in text.splitlines() if line.startswith("ray_expunge_")]
    assert {line.partition("{")[0].removeprefix("ray_") for line in mine} == set(metrics.METRICS)
    assert any('model="none"' in line and line.endswith(" 36500.0") for line in mine)


def test_the_runbook_explains_each() -> None:
    text = (Path(__file__).parents[2] / "deploy" / "RUNBOOK.md").read_text()
    for name, (_, labels) in metrics.METRICS.items():
        assert f"| `{name}` | {', '.join(labels)} |" in text
