"""The records that the request store returns."""

from datetime import date, datetime

from pydantic import JsonValue

from expunge.types import DEFAULT_TENANT, BlobId, Identifier, RemovalRequest, RequestState, Value


class RequestEvent(Value):
    """One line of the audit log. `detail` is empty where a purge has destroyed its key."""

    at: datetime
    actor: str = ""
    reason: str = ""
    release: str = ""
    """The version of the code that wrote it. Empty, as actor and reason are, in a line of an earlier release."""
    previous: RequestState | None
    state: RequestState
    batch: Identifier | None
    detail: str


class RequestRecord(Value):
    """A request and where it stands. `batch` is the latest that it was in, even if it went back to the queue."""

    request: RemovalRequest
    state: RequestState
    batch: Identifier | None
    attempts: int
    accepted_at: datetime
    tenant: Identifier = DEFAULT_TENANT
    due: date | None = None
    """When it is due: its own date, or else the one that the settings gave it when it was accepted."""
    evidence: dict[str, JsonValue] | None
    history: tuple[RequestEvent, ...]

    def days_left(self, today: date) -> int | None:
        """Days until it is due, negative if that is past; None without a date, or once it is decided."""
        waits = self.state in (RequestState.ACCEPTED, RequestState.BATCHED, RequestState.FAILED)
        return (self.due - today).days if waits and self.due else None


class BatchRecord(Value):
    """One night: open until `closed`; `report` names the sealed report once there is one.

    `starts` counts the drivers that have begun on it since it last made progress.
    """

    id: Identifier
    created: datetime
    closed: datetime | None
    starts: int
    report: BlobId | None
    requests: tuple[Identifier, ...]
