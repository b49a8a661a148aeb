"""What the service answers. Events leave actor and text out: they are the operator's own words."""

from datetime import date, datetime
from typing import Self

from pydantic import BaseModel, JsonValue

from expunge.requests.records import RequestRecord
from expunge.types import RequestState


class Accepted(BaseModel):
    """A submission's answer. `new` is false where the request was known already."""

    id: str
    new: bool
    state: RequestState
    due: date | None
    notes: list[str]


class Line(BaseModel):
    """One line of a batch: the id of its request, or why it was refused."""

    line: int
    id: str | None = None
    new: bool = False
    error: str | None = None
    hint: str | None = None
    notes: list[str] = []


class AcceptedLines(BaseModel):
    accepted: int
    known: int
    refused: int
    lines: list[Line]


class Event(BaseModel):
    at: datetime
    previous: RequestState | None
    state: RequestState
    reason: str


class Summary(BaseModel):
    """A request in a list."""

    id: str
    external_id: str
    model: str
    state: RequestState
    batch: str | None
    attempts: int
    priority: int
    accepted_at: datetime
    due: date | None
    days_left: int | None

    @classmethod
    def of(cls, record: RequestRecord) -> Self:
        return cls.model_validate(_summary(record))


class Page(BaseModel):
    """`next` is the cursor of the next page; null on the last one."""

    items: list[Summary]
    next: str | None


class Removal(Summary):
    """A request with what was said of it, what a night found, and its history."""

    images: int
    surrogates: int
    prompt: str | None
    reason: str
    evidence: dict[str, JsonValue] | None
    history: list[Event]

    @classmethod
    def of(cls, record: RequestRecord) -> Self:
        request = record.request
        events = [Event(at=e.at, previous=e.previous, state=e.state, reason=e.reason) for e in record.history]
        # What evidence rests on describes the operator's set-up.
        evidence = record.evidence and {name: value for name, value in record.evidence.items() if name != "basis"}
        own = {"prompt": request.prompt, "reason": request.reason, "evidence": evidence, "history": events}
        counts = {"images": len(request.images), "surrogates": len(request.surrogates)}
        return cls.model_validate({**_summary(record), **counts, **own})


class Moved(BaseModel):
    id: str
    state: RequestState


class Verdict(BaseModel):
    """How a night judged one request. `promoted` is true if the version that removes it became the champion."""

    request: str
    model: str
    verdict: str
    why: str
    promoted: bool


class Batch(BaseModel):
    """A night, as far as it concerns the caller's tenant. `verdicts` is null until it has ended."""

    id: str
    created: datetime
    closed: datetime | None
    requests: list[str]
    verdicts: list[Verdict] | None


class Health(BaseModel):
    status: str


class Problem(BaseModel):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str | None = None
    hint: str | None = None


def _summary(record: RequestRecord) -> dict[str, object]:
    request = record.request
    return {
        "id": request.id,
        "external_id": request.external_id,
        "model": request.model,
        "state": record.state,
        "batch": record.batch,
        "attempts": record.attempts,
        "priority": request.priority,
        "accepted_at": record.accepted_at,
        "due": record.due,
        "days_left": record.days_left(date.today()),
    }
