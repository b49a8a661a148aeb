"""The metrics of a night, which Prometheus reads from the endpoint of the Ray node that a process runs on.

Labels name models and stages, never requests. Ray exports a process's last values when it ends and drops them about
15 s later, so scrape at least every 10 s.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime
from functools import cache

from ray.util.metrics import Gauge

from expunge.requests.store import RequestStore
from expunge.runs.outcomes import JobOutcome
from expunge.settings import Settings
from expunge.types import RequestState

METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "expunge_queue_depth": ("Undecided requests: accepted, or in a batch", ("model",)),
    "expunge_queue_oldest_seconds": ("Age of the oldest undecided request; 0 if there is none", ("model",)),
    "expunge_queue_due_days": (
        "Days until the end of the nearest due date; 36500 if there is none",
        ("model",),
    ),
    "expunge_stage_seconds": ("Duration of a stage in the latest job that finished it", ("model", "stage")),
    "expunge_train_steps_per_second": ("Optimizer steps per second, over the last few steps", ("model",)),
    "expunge_train_conflict_rate": ("Share of forget gradients that pointed against the retain gradient", ("model",)),
    "expunge_gate_failures": ("Requests of the night that did not pass their gate", ("model",)),
    "expunge_not_reproduced": ("Requests of the night whose target the base model does not reproduce", ("model",)),
    "expunge_resurfaced": ("Requests removed earlier that the night's hotfix generates again", ("model",)),
    "expunge_job_errors": ("Jobs of the night that left no evidence", ("model",)),
}
"""Maps each name (Prometheus sees it with the prefix `ray_`) to its meaning and its labels."""

NOTHING_DUE = 36500.0
"""A hundred years, because Ray does not export infinity, and without a new value the previous one would stay."""

OPEN = (RequestState.ACCEPTED, RequestState.BATCHED)

DUE = (*OPEN, RequestState.FAILED)
"""A request that needs a person is still due."""


def report_queue(store: RequestStore, settings: Settings, now: datetime | None = None) -> None:
    """Report the queue of every model that has one or might have one; an empty queue is reported as empty."""
    now = now or datetime.now(UTC)
    backlog = store.backlog(DUE)
    for model in sorted({*settings.models, *(model for model, _ in backlog)}):
        waiting = [backlog[model, state] for state in OPEN if (model, state) in backlog]
        due = [backlog[model, state].due for state in DUE if (model, state) in backlog]
        ages = [(now - each.oldest).total_seconds() for each in waiting]
        days = [_days_left(date, now) for date in due if date is not None]
        put("expunge_queue_depth", sum(each.requests for each in waiting), model=model)
        put("expunge_queue_oldest_seconds", max(ages, default=0.0), model=model)
        put("expunge_queue_due_days", min(days, default=NOTHING_DUE), model=model)


def report_outcomes(outcomes: Sequence[JobOutcome]) -> None:
    """Report how the night ended for each model."""
    for outcome in outcomes:
        job, evidence = outcome.job, outcome.evidence
        put("expunge_job_errors", int(outcome.error is not None), model=job.model)
        if evidence is None:
            continue
        earlier = {request.id for request in job.ledger}
        back = [r for r in evidence.requests if r.request in earlier and r.verdict == "failed"]
        decided = evidence.passed | outcome.not_reproduced
        failed = [request for request in job.requests if request.id not in decided]
        put("expunge_resurfaced", len(back), model=job.model)
        put("expunge_gate_failures", len(failed), model=job.model)
        put("expunge_not_reproduced", len(outcome.not_reproduced), model=job.model)


@contextmanager
def timed(model: str, stage: str) -> Iterator[None]:
    """Report how long a stage took, if it succeeds. A stage that was finished before a resume takes no time."""
    began = time.monotonic()
    yield
    put("expunge_stage_seconds", time.monotonic() - began, model=model, stage=stage)


class TrainingRate:
    """Reports steps per second between two records of a training; it is pickled to rank 0 before the first."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._last: tuple[int, float] | None = None

    def __call__(self, step: int, figures: Mapping[str, float]) -> None:
        now = time.monotonic()
        if self._last and step > self._last[0] and now > self._last[1]:
            rate = (step - self._last[0]) / (now - self._last[1])
            put("expunge_train_steps_per_second", rate, model=self._model)
        self._last = step, now
        if "surgery/conflict" in figures:
            put("expunge_train_conflict_rate", figures["surgery/conflict"], model=self._model)


def put(name: str, value: float, **labels: str) -> None:
    """Set the metric `name` of METRICS to `value`."""
    gauge(name).set(value, labels)


@cache
def gauge(name: str) -> Gauge:
    about, labels = METRICS[name]
    return Gauge(name, description=about, tag_keys=labels)


def _days_left(due: date, now: datetime) -> float:
    """Return the days until the due date ends, at midnight UTC."""
    end = datetime(due.year, due.month, due.day, tzinfo=UTC).timestamp() + 86400
    return (end - now.timestamp()) / 86400
